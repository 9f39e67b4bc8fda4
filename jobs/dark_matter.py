"""Every analysis of SAEs' errors on one sweep, and a report with a verdict per claim of the paper.

python jobs/dark_matter.py                               the latest sweep in MLflow
python jobs/dark_matter.py --sweep STUDY                 another, by its name or run id
python jobs/dark_matter.py --sae FOLDER --sae RUN_ID     single SAEs: of MLflow, saved, or public
ray job submit --working-dir . -- python jobs/dark_matter.py
"""

from raysae.cli import main, parse
from raysae.config import AnalysisConfig


def job(argv: list[str]) -> int:
    config, flags = parse(AnalysisConfig, argv, __doc__)
    from raysae.analysis.experiments import run_all  # imports torch and Ray: only after --help and mistakes in the arguments

    return run_all(config, flags.given)


if __name__ == "__main__":
    main(job)
