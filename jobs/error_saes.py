"""Compare SAEs of an SAE's error, linear error and nonlinear error (analysis 6). Trains these three SAEs.

python jobs/error_saes.py                               the latest sweep in MLflow
python jobs/error_saes.py --sweep STUDY                 another, by its name or run id
python jobs/error_saes.py --sae FOLDER --sae RUN_ID     SAEs in a folder, in MLflow, or public
ray job submit --working-dir . -- python jobs/error_saes.py
"""

from raysae.commands.analyse import analyse
from raysae.commands.parse import main

if __name__ == "__main__":
    main(analyse("error_saes", __doc__))
