"""Run every analysis of SAEs' errors on one sweep. Its report has a verdict for each claim of the paper.

python jobs/dark_matter.py                               the latest sweep in MLflow
python jobs/dark_matter.py --sweep STUDY                 another, by its name or run id
python jobs/dark_matter.py --sae FOLDER --sae RUN_ID     SAEs in a folder, in MLflow, or public
ray job submit --working-dir . -- python jobs/dark_matter.py
"""

from raysae.commands.analyse import dark_matter
from raysae.commands.parse import main

if __name__ == "__main__":
    main(dark_matter(__doc__))
