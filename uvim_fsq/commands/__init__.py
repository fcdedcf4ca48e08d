"""The commands of `uvim-fsq`, one module each: HELP, `add_arguments(parser)` and `run(args)`.

Heavy imports are inside `run`, after the checks that do not need them, so that --help and a misspelled key are
answered at once.
"""
