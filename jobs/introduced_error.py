"""Put errors in on purpose and see what the regression makes of them (analysis 4).

python jobs/introduced_error.py                               the latest sweep in MLflow
python jobs/introduced_error.py --sweep STUDY                 another, by its name or run id
python jobs/introduced_error.py --sae FOLDER --sae RUN_ID     SAEs in a folder, in MLflow, or public
ray job submit --working-dir . -- python jobs/introduced_error.py
"""

from raysae.commands.analyse import analyse
from raysae.commands.parse import main

if __name__ == "__main__":
    main(analyse("introduced_error", __doc__))
