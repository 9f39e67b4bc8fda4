"""How much of the error is a linear function of what earlier parts of the model hold (analysis 8). Trains the SAEs it lacks.

python jobs/earlier_layers.py                               the latest sweep in MLflow
python jobs/earlier_layers.py --sweep STUDY                 another, by its name or run id
python jobs/earlier_layers.py --sae FOLDER --sae RUN_ID     single SAEs: of MLflow, saved, or public
ray job submit --working-dir . -- python jobs/earlier_layers.py
"""

from raysae.cli import main, parse
from raysae.config import AnalysisConfig


def job(argv: list[str]) -> int:
    config, flags = parse(AnalysisConfig, argv, __doc__)
    from raysae.analysis.experiments import run  # imports torch and Ray: only after --help and mistakes in the arguments

    return run(config, flags.given, "earlier_layers")


if __name__ == "__main__":
    main(job)
