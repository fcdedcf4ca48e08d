"""A page in the browser that shows what a run predicts. The pictures are made without it, so they need no browser."""
