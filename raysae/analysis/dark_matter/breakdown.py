"""What the error consists of, over widths (analysis 1): the experiment. Its figure is in `error_parts`.

It stands on two others. The regressions give FVU and nonlinear FVU, pursuit the encoder's share of the latter. It asks
for the tasks of both, so it may run before them.
"""

from __future__ import annotations

import pandas as pd

from raysae.analysis.dark_matter.error_parts import FEWEST_WIDTHS, breakdown_figure, taken_apart
from raysae.analysis.dark_matter.probes import described, main_hook_point, shown
from raysae.analysis.dark_matter.pursuit import PURSUIT_ROWS, pursuit_tasks
from raysae.analysis.instruments import columns as col
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.results import Findings

# ---------------------------------------------------------------- the experiment


def run(lab: Lab) -> Findings:
    """The fit of FVU against width, the level of the nonlinear FVU, and the error of each width taken apart."""
    there = len({sae.width for sae in lab.of(main_hook_point(lab)).values()})
    if there < FEWEST_WIDTHS:  # Known before any work
        note = f"a fit against width needs {FEWEST_WIDTHS} widths, there are {there}"
        return Findings("breakdown", lab.key(*lab.saes.values()), pd.DataFrame({"sae": list(lab.saes)}), notes=[note])
    chosen = shown(lab)
    key = lab.key(*chosen.saes.values(), rows=PURSUIT_ROWS)
    findings = Findings("breakdown", key, pd.DataFrame({"sae": list(chosen.saes)}))
    table, widths = chosen.table.copy(), chosen.table["width"].nunique()
    if widths < FEWEST_WIDTHS:
        findings.notes.append(f"a fit against width needs {FEWEST_WIDTHS} widths, there are {widths}")
        return findings
    pursued = pd.concat(lab.run(pursuit_tasks(lab, chosen))).set_index("sae")[col.ENCODER_SHARE]
    table[col.ENCODER_SHARE] = pursued.reindex(table["sae"]).to_numpy()
    parts, law, level = taken_apart(table)
    of_level = {f"{col.LEVEL}{name}": value for name, value in vars(level).items()}
    findings.tables = {"breakdown": parts, "fit": pd.DataFrame([vars(law) | of_level])}
    findings.numbers = {"fit/c": law.c, "fit/m": law.m, "fit/c_low": law.c_low, "fit/c_high": law.c_high}
    findings.numbers |= {"level/value": level.value, "level/slope": level.slope}
    findings.numbers["level/share_of_fall"] = level.share_of_fall
    findings.figures["breakdown"] = breakdown_figure(parts, law, level, described(lab, chosen))
    return findings
