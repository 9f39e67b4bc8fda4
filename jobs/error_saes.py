"""SAEs trained on the error of an SAE and on its two parts, compared (analysis 6). Trains three SAEs.

python jobs/error_saes.py                               the latest sweep in MLflow
python jobs/error_saes.py --sweep STUDY                 another, by its name or run id
python jobs/error_saes.py --sae FOLDER --sae RUN_ID     single SAEs: of MLflow, saved, or public
ray job submit --working-dir . -- python jobs/error_saes.py
"""

from raysae.cli import main, parse
from raysae.config import AnalysisConfig


def job(argv: list[str]) -> int:
    config, flags = parse(AnalysisConfig, argv, __doc__)
    from raysae.analysis.experiments import run  # imports torch and Ray: only after --help and mistakes in the arguments

    return run(config, flags.given, "error_saes")


if __name__ == "__main__":
    main(job)
