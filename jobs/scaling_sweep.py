"""Train a sweep of sparse autoencoders on one pass of a language model.

python jobs/scaling_sweep.py                                              the default: 18 SAEs of the embedded model
python jobs/scaling_sweep.py --widths 512,2048 --k 16 --train.tokens 2e6  other sizes
python jobs/scaling_sweep.py --config sweep.yaml                          knobs from a file
python jobs/scaling_sweep.py --resume STUDY                               go on with a sweep that was interrupted
ray job submit --working-dir . -- python jobs/scaling_sweep.py            the same on a running cluster
"""

from raysae.commands.parse import main
from raysae.commands.sweep import sweep

if __name__ == "__main__":
    main(sweep(__doc__))
