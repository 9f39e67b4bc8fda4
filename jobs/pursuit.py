"""See how much of the nonlinear error a better choice of active latents removes (analysis 7).

python jobs/pursuit.py                               the latest sweep in MLflow
python jobs/pursuit.py --sweep STUDY                 another, by its name or run id
python jobs/pursuit.py --sae FOLDER --sae RUN_ID     SAEs in a folder, in MLflow, or public
ray job submit --working-dir . -- python jobs/pursuit.py
"""

from raysae.commands.analyse import analyse
from raysae.commands.parse import main

if __name__ == "__main__":
    main(analyse("pursuit", __doc__))
