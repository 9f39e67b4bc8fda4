"""Predict SAEs' error linearly from earlier layers of the model (analysis 8). Trains the SAEs it lacks.

python jobs/earlier_layers.py                               the latest sweep in MLflow
python jobs/earlier_layers.py --sweep STUDY                 another, by its name or run id
python jobs/earlier_layers.py --sae FOLDER --sae RUN_ID     SAEs in a folder, in MLflow, or public
ray job submit --working-dir . -- python jobs/earlier_layers.py
"""

from raysae.commands.analyse import analyse
from raysae.commands.parse import main

if __name__ == "__main__":
    main(analyse("earlier_layers", __doc__))
