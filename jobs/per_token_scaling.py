"""Predict a large SAE's error on a token from a small one's (analysis 3). Writes per-token tables.

python jobs/per_token_scaling.py                               the latest sweep in MLflow
python jobs/per_token_scaling.py --sweep STUDY                 another, by its name or run id
python jobs/per_token_scaling.py --sae FOLDER --sae RUN_ID     SAEs in a folder, in MLflow, or public
ray job submit --working-dir . -- python jobs/per_token_scaling.py
"""

from raysae.commands.analyse import analyse
from raysae.commands.parse import main

if __name__ == "__main__":
    main(analyse("per_token_scaling", __doc__))
