"""lm-eval's own command line, with the model ``spattn_olmoe`` known to it.

python -m spattn_olmoe.evaluation --model spattn_olmoe --model_args checkpoint=DIR --tasks piqa
"""

from lm_eval.__main__ import cli_evaluate

from . import model  # noqa: F401  registers the model

if __name__ == "__main__":
    cli_evaluate()
