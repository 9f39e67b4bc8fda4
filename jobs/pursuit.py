"""How much of the nonlinear error a better choice of active latents removes (analysis 7).

python jobs/pursuit.py                               the latest sweep in MLflow
python jobs/pursuit.py --sweep STUDY                 another, by its name or run id
python jobs/pursuit.py --sae FOLDER --sae RUN_ID     single SAEs: of MLflow, saved, or public
ray job submit --working-dir . -- python jobs/pursuit.py
"""

from raysae.cli import main, parse
from raysae.config import AnalysisConfig


def job(argv: list[str]) -> int:
    config, flags = parse(AnalysisConfig, argv, __doc__)
    from raysae.analysis.experiments import run  # imports torch and Ray: only after --help and mistakes in the arguments

    return run(config, flags.given, "pursuit")


if __name__ == "__main__":
    main(job)
