"""What the linear and the nonlinear part of the error cost the language model (analysis 5).

python jobs/downstream_loss.py                               the latest sweep in MLflow
python jobs/downstream_loss.py --sweep STUDY                 another, by its name or run id
python jobs/downstream_loss.py --sae FOLDER --sae RUN_ID     single SAEs: of MLflow, saved, or public
ray job submit --working-dir . -- python jobs/downstream_loss.py
"""

from raysae.cli import main, parse
from raysae.config import AnalysisConfig


def job(argv: list[str]) -> int:
    config, flags = parse(AnalysisConfig, argv, __doc__)
    from raysae.analysis.experiments import run  # imports torch and Ray: only after --help and mistakes in the arguments

    return run(config, flags.given, "downstream_loss")


if __name__ == "__main__":
    main(job)
