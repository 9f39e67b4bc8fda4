"""Train a sweep of sparse autoencoders on one pass of a language model.

python jobs/scaling_sweep.py                                              the default: 18 SAEs of the embedded model
python jobs/scaling_sweep.py --widths 512,2048 --k 16 --train.tokens 2e6  other sizes
python jobs/scaling_sweep.py --config sweep.yaml                          knobs from a file
python jobs/scaling_sweep.py --resume STUDY                               go on with a sweep that was interrupted
ray job submit --working-dir . -- python jobs/scaling_sweep.py            the same on a running cluster
"""

from raysae.cli import main, parse
from raysae.config import SweepConfig, UserError

FLAGS = {
    "--resume": {"metavar": "STUDY", "help": "go on with the interrupted study of this name in `output`; its config is the one it was started with"},
    "--allow": {
        "metavar": "FACTS",
        "default": "",
        "help": "facts, separated by commas, in which a resumed run may differ from its checkpoints, e.g. torch,device",
    },
}


def job(argv: list[str]) -> int:
    config, flags = parse(SweepConfig, argv, __doc__, FLAGS)
    if flags.resume and (others := set(flags.given) - {"output"}):
        raise UserError(f"--resume {flags.resume} goes on with the study's own config: leave out --{sorted(others)[0]}.")
    from raysae.sweep.run import run_sweep  # imports Ray: only after --help and mistakes in the arguments

    return run_sweep(config, resume=flags.resume, allow=frozenset(filter(None, flags.allow.split(","))))


if __name__ == "__main__":
    main(job)
