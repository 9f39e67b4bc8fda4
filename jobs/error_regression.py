"""How much of SAEs' error is a linear function of the activation, and how it falls with width (analyses 1 and 2).

python jobs/error_regression.py                               the latest sweep in MLflow
python jobs/error_regression.py --sweep STUDY                 another, by its name or run id
python jobs/error_regression.py --sae FOLDER --sae RUN_ID     single SAEs: of MLflow, saved, or public
ray job submit --working-dir . -- python jobs/error_regression.py
"""

from raysae.cli import main, parse
from raysae.config import AnalysisConfig


def job(argv: list[str]) -> int:
    config, flags = parse(AnalysisConfig, argv, __doc__)
    from raysae.analysis.experiments import run  # imports torch and Ray: only after --help and mistakes in the arguments

    return run(config, flags.given, "error_regression")


if __name__ == "__main__":
    main(job)
