"""What `avar vas` leaves in vas.parquet, read with pandas: which heads look at the image, and in which samples.

python examples/read_parquet.py FOLDER        a folder of results, such as runs/vas/MODEL
"""

import sys
from pathlib import Path

import pandas as pd

folder = Path(sys.argv[1])
heads = pd.read_parquet(folder / "vas.parquet")  # a row for each sample × scope × layer × head
samples = pd.read_parquet(folder / "samples.parquet").set_index("id")  # question, response, numbers of tokens

# Means over samples count every sample by its queries, as VAS does.
heads["weighted"] = heads["visual_mass"] * heads["queries"]
sums = heads.groupby(["scope", "layer", "head"])[["weighted", "queries"]].sum()
mass = (sums["weighted"] / sums["queries"]).rename("visual mass")
print("Heads that look at the image most:", mass.sort_values(ascending=False).head(5), sep="\n")
print("\nVisual mass by layer:", mass.groupby(["scope", "layer"]).mean().unstack("scope"), sep="\n")

by_sample = heads.groupby(["scope", "id"])["visual_mass"].mean().loc[heads["scope"].iloc[-1]].sort_values()
for name in by_sample.index[:3]:
    print(f"\nlooks little ({by_sample[name]:.1%}): {samples.loc[name, 'question']}\n  {samples.loc[name, 'response']}")
