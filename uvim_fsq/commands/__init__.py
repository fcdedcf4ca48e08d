"""The commands of `uvim-fsq`, one module each: HELP, `add_arguments(parser)` and `run(args)`.

Heavy imports stay inside `run`, after everything that can be refused without them, so that --help and a misspelt key
are answered at once.
"""
