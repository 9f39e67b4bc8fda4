"""Train a sweep of sparse autoencoders on one pass of a language model.

python jobs/scaling_sweep.py                                              the default: 18 SAEs of the embedded model
python jobs/scaling_sweep.py --widths 512,2048 --k 16 --train.tokens 2e6  other sizes
python jobs/scaling_sweep.py --config sweep.yaml                          knobs from a file
python jobs/scaling_sweep.py --resume STUDY                               go on with a sweep that was interrupted
ray job submit --working-dir . -- python jobs/scaling_sweep.py            the same on a running cluster
"""

from raysae.cli import main, parse
from raysae.config import FACTS, SweepConfig, UserError

FLAGS = {
    "--resume": {
        "metavar": "STUDY",
        "help": "go on with the interrupted study of this name in `output`, with its own config but for faults.*",
    },
    "--allow": {
        "metavar": "FACTS",
        "default": "",
        "help": "facts, separated by commas, in which a resumed run may differ from its checkpoints, e.g. torch,device",
    },
}


def job(argv: list[str]) -> int:
    config, flags = parse(SweepConfig, argv, __doc__, FLAGS)
    allow = frozenset(filter(None, flags.allow.split(",")))
    if unknown := sorted(fact for fact in allow if fact not in FACTS and not fact.startswith(("sae.", "train."))):
        raise UserError(f"--allow {unknown[0]}: there is no such fact, there are {', '.join(FACTS)}, sae.KNOB and train.KNOB")
    if flags.resume:
        faults = {knob.removeprefix("faults.") for knob in flags.given if knob.startswith("faults.")}
        if others := sorted(flags.given.keys() - {"output"} - {f"faults.{name}" for name in faults}):
            raise UserError(f"--resume {flags.resume} goes on with the study's own config, but for faults.*: leave out --{', --'.join(others)}")
        from raysae.sweep.place import saved_config

        config = saved_config(config.output, flags.resume, {name: getattr(config.faults, name) for name in faults})
    from raysae.sweep.run import run_sweep  # imports Ray: only after --help and mistakes in the arguments

    return run_sweep(config, resume=flags.resume, allow=allow)


if __name__ == "__main__":
    main(job)
