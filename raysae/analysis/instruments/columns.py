"""The names of the columns in the analyses' tables, and of the metrics made of them.

A measure writes a column, and figures, claims and reports read it under the name given here. Tables and MLflow keep
these names between versions. The columns that say which SAE a row is about (`sae`, `hook_point`, `layer`, `width`,
`architecture`) are named like its knobs and are not repeated here.
"""

from __future__ import annotations

# ---------------------------------------------------------------- endings of a name

LOW, HIGH = "_low", "_high"  # The ends of a number's 95 % interval, beside the number itself.
REPLICATES = "_replicates"  # The number on each replicate of the groups, a list.
GROUPS = "groups"  # Groups of documents that a row's numbers were measured on.
RESCALED = "_rescaled"  # After the best rescaling of the reconstruction.
HALF_FIT = "_half_fit"  # The fit has read half the contexts.
HALF = "_half"  # The SAE has trained on half the tokens.
PURSUIT = "_pursuit"  # Pursuit has chosen the latents.
WEIGHTED = "_weighted"  # The mean over dimensions is weighted by variance.
CLOSED_FORM = "_closed_form"  # The estimate's limit for many rows, by formula.


def low(column: str) -> str:
    """The lower end of a number's interval."""
    return column + LOW


def high(column: str) -> str:
    """The upper end of a number's interval."""
    return column + HIGH


def replicates(column: str) -> str:
    """A number's replicates."""
    return column + REPLICATES


# ---------------------------------------------------------------- an SAE and its error

ALIKE = "alike"  # Architecture, learning rate and seed in words. Figures compare SAEs in which these are equal.
L0 = "l0"  # Mean active latents per row.
FVU = "fvu"  # FVU(x, Sae(x)).
NONLINEAR_FVU = "nonlinear_fvu"  # FVU(x, Sae(x) + ê).
FVU_INLIERS, NONLINEAR_FVU_INLIERS = "fvu_inliers", "nonlinear_fvu_inliers"  # Without rows of outlier norm.
LINEAR_GAP = "linear_gap"  # FVU less nonlinear FVU.
DEAD_FRACTION = "dead_fraction"  # Share of the latents that no row activates.

# Parts of an error. Some tables have a column for each, others a row.
ERROR = "error"
LINEAR = "linear"
NONLINEAR = "nonlinear"

# ---------------------------------------------------------------- error_regression

R2_ERROR = "r2_error"  # R² of ê for e.
R2_ERROR_WEIGHTED = R2_ERROR + WEIGHTED
R2_NORM_X = "r2_norm_x"  # R² of ‖v‖² predicted from x, here for v = x.
R2_NORM_RECONSTRUCTION = "r2_norm_reconstruction"
R2_NORM_RECONSTRUCTION_PLUS_NONLINEAR = "r2_norm_reconstruction_plus_nonlinear"
R2_NORM_LINEAR = "r2_norm_linear"
R2_NORM_NONLINEAR = "r2_norm_nonlinear"
R2_ERROR_NORM = "r2_error_norm"  # R² of ‖e‖² predicted from x.
R2_ERROR_NORM_FROM_TOKEN = "r2_error_norm_from_token"
R2_ERROR_NORM_FROM_TOKEN_LOSS = "r2_error_norm_from_token_loss"
R2_ERROR_NORM_FROM_L0 = "r2_error_norm_from_l0"
R2_ERROR_NORM_FROM_X_NORM = "r2_error_norm_from_x_norm"
R2_ERROR_NORM_LEAD = "r2_error_norm_lead"  # R2_ERROR_NORM less the best of those four.
R2_NORM_NONLINEAR_LACK = "r2_norm_nonlinear_lack"  # R2_ERROR_NORM less R2_NORM_NONLINEAR.

# ---------------------------------------------------------------- breakdown

ABSENT = "absent"  # FVU less c: features that no latent stands for.
ENCODER = "encoder"  # Nonlinear error that pursuit removes, as FVU.
STACKS = "stacks"  # Whether absent, linear and nonlinear error are parts of FVU.
LEVEL = "level_"  # Beginning of the columns that hold a `Level` of the nonlinear FVU.

# ---------------------------------------------------------------- per_token_scaling

SMALL, LARGE = "small", "large"  # Names of the SAEs of a pair.
SMALL_WIDTH, LARGE_WIDTH = "small_width", "large_width"
R2 = "r2"  # R² of ‖e_large‖ from ‖e_small‖. In earlier_layers: of a target from a source.
SQUARED_CORRELATION = "squared_correlation"
R2_FROM_X_NORM = "r2_from_x_norm"  # R² of ‖e_large‖ from ‖x‖.
R2_BEYOND_X_NORM = "r2_beyond_x_norm"  # What ‖e_small‖ explains of what ‖x‖ leaves.
R2_WITH_NONLINEAR = "r2_with_nonlinear"  # ‖ε_small‖ is a predictor too.
GAIN = "gain"
POSITION, TOKEN = "position", "token"

# ---------------------------------------------------------------- introduced_error

ABLATED = "ablated"  # Share of the latents that are left out.
SIGMA_X, SIGMA_R = "sigma_x", "sigma_r"  # Noise in x and in Sae(x).
DENSE, INTRODUCED = "dense", "introduced"  # What was put in, as shares of the variance.
DEVIATION = "deviation"  # The larger relative distance of both estimates from their closed forms.
REENCODING_FVU = "reencoding_fvu"  # FVU(x′, Sae(x′)).
NOISE = "noise"  # SIGMA_X or SIGMA_R, in the table of correlations.

# ---------------------------------------------------------------- downstream_loss

CE_CLEAN, CE_SAE = "ce_clean", "ce_sae"  # Cross-entropy with x and with Sae(x).


def ce(part: str) -> str:
    """Cross-entropy with Sae(x) and that part of the error."""
    return f"ce_{part}"


def recovered(part: str) -> str:
    """Share of the lost cross-entropy that the part of the error recovers."""
    return f"recovered_{part}"


def norm_share(part: str) -> str:
    """The part's share of the error's norm."""
    return f"norm_share_{part}"


def variance_share(part: str) -> str:
    """The part's share of the error's variance."""
    return f"variance_share_{part}"


# ---------------------------------------------------------------- error_saes

KIND = "kind"  # ERROR, LINEAR or NONLINEAR: what the SAE was trained on.
SEED, SEEDS = "seed", "seeds"  # Which of the SAEs of a kind, and how many there are.
EQUAL_L0 = "equal_l0"  # The L0 at which the SAEs are compared.
FVU_EQUAL_L0 = FVU + "_" + EQUAL_L0
WORSE = "worse"  # FVU at equal L0 over that of the SAEs on ê, less 1.
SHARE = "share"  # Variance of what the SAEs read over that of e.

# ---------------------------------------------------------------- pursuit

FVU_PURSUIT = FVU + PURSUIT
NONLINEAR_FVU_PURSUIT = NONLINEAR_FVU + PURSUIT
L0_PURSUIT = L0 + PURSUIT
ENCODER_ERROR = "encoder_error"  # NONLINEAR_FVU less NONLINEAR_FVU_PURSUIT.
ENCODER_SHARE = "encoder_share"  # ENCODER_ERROR as a share of NONLINEAR_FVU.

# ---------------------------------------------------------------- earlier_layers

SOURCE = "source"  # Hook point that a prediction reads.
PART = "part"  # What of it: activation, reconstruction or one of the errors.
TARGET = "target"  # What is predicted: e, ê or ε.
EXPLAINED = "explained"  # Share of ε's variance that the best earlier reconstruction explains.
LEAD = "lead"  # EXPLAINED less ENCODER_SHARE.
BY_DEFINITION = "by_definition"  # Whether the source determines the target.
R2_WEIGHTED = R2 + WEIGHTED
