"""Predict SAEs' error and its squared norm from the activation by linear maps (analyses 1 and 2).

python jobs/error_regression.py                               the latest sweep in MLflow
python jobs/error_regression.py --sweep STUDY                 another, by its name or run id
python jobs/error_regression.py --sae FOLDER --sae RUN_ID     SAEs in a folder, in MLflow, or public
ray job submit --working-dir . -- python jobs/error_regression.py
"""

from raysae.commands.analyse import analyse
from raysae.commands.parse import main

if __name__ == "__main__":
    main(analyse("error_regression", __doc__))
