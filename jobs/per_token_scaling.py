"""How well a small SAE's error on a token tells a large one's; the per-token tables (analysis 3).

python jobs/per_token_scaling.py                               the latest sweep in MLflow
python jobs/per_token_scaling.py --sweep STUDY                 another, by its name or run id
python jobs/per_token_scaling.py --sae FOLDER --sae RUN_ID     single SAEs: of MLflow, saved, or public
ray job submit --working-dir . -- python jobs/per_token_scaling.py
"""

from raysae.cli import main, parse
from raysae.config import AnalysisConfig


def job(argv: list[str]) -> int:
    config, flags = parse(AnalysisConfig, argv, __doc__)
    from raysae.analysis.experiments import run  # imports torch and Ray: only after --help and mistakes in the arguments

    return run(config, flags.given, "per_token_scaling")


if __name__ == "__main__":
    main(job)
