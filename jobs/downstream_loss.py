"""Measure what the linear and the nonlinear error cost the language model (analysis 5).

python jobs/downstream_loss.py                               the latest sweep in MLflow
python jobs/downstream_loss.py --sweep STUDY                 another, by its name or run id
python jobs/downstream_loss.py --sae FOLDER --sae RUN_ID     SAEs in a folder, in MLflow, or public
ray job submit --working-dir . -- python jobs/downstream_loss.py
"""

from raysae.commands.analyse import analyse
from raysae.commands.parse import main

if __name__ == "__main__":
    main(analyse("downstream_loss", __doc__))
