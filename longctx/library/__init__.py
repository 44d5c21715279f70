"""The functions of the public API that read plain arguments; `longctx` itself names them.

Each checks its arguments and calls the code behind the verb. Heavy packages are imported inside the functions, so that
importing these modules loads neither torch nor transformers.
"""
