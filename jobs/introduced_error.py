"""What the regression makes of errors put in on purpose, where the truth is known (analysis 4).

python jobs/introduced_error.py                               the latest sweep in MLflow
python jobs/introduced_error.py --sweep STUDY                 another, by its name or run id
python jobs/introduced_error.py --sae FOLDER --sae RUN_ID     single SAEs: of MLflow, saved, or public
ray job submit --working-dir . -- python jobs/introduced_error.py
"""

from raysae.cli import main, parse
from raysae.config import AnalysisConfig


def job(argv: list[str]) -> int:
    config, flags = parse(AnalysisConfig, argv, __doc__)
    from raysae.analysis.experiments import run  # imports torch and Ray: only after --help and mistakes in the arguments

    return run(config, flags.given, "introduced_error")


if __name__ == "__main__":
    main(job)
