"""What the error consists of over widths: absent features, linear error, nonlinear error (analysis 1).

python jobs/breakdown.py                               the latest sweep in MLflow
python jobs/breakdown.py --sweep STUDY                 another, by its name or run id
python jobs/breakdown.py --sae FOLDER --sae RUN_ID     single SAEs: of MLflow, saved, or public
ray job submit --working-dir . -- python jobs/breakdown.py
"""

from raysae.commands.analyse import analyse
from raysae.commands.parse import main

if __name__ == "__main__":
    main(analyse("breakdown", __doc__))
