"""lm-eval's own command line, with the model ``spattn_olmoe`` known to it.

python -m spattn_olmoe.evaluation --model spattn_olmoe --model_args checkpoint=DIR --tasks piqa
python -m spattn_olmoe.evaluation offline-tasks FOLDER      writes definitions for lm-eval's --include_path FOLDER
"""

import sys
from pathlib import Path

from lm_eval.__main__ import cli_evaluate

from .. import ranks
from ..errors import user_errors
from . import model, offline  # noqa: F401  model registers itself

if __name__ == "__main__":
    with user_errors(), ranks.together():
        if len(sys.argv) == 3 and sys.argv[1] == "offline-tasks":
            offline.write_definitions(Path(sys.argv[2]))
        else:
            cli_evaluate()
