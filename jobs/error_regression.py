"""How much of SAEs' error a linear map of the activation predicts, and of its squared norm (analyses 1 and 2).

python jobs/error_regression.py                               the latest sweep in MLflow
python jobs/error_regression.py --sweep STUDY                 another, by its name or run id
python jobs/error_regression.py --sae FOLDER --sae RUN_ID     single SAEs: of MLflow, saved, or public
ray job submit --working-dir . -- python jobs/error_regression.py
"""

from raysae.commands.analyse import analyse
from raysae.commands.parse import main

if __name__ == "__main__":
    main(analyse("error_regression", __doc__))
