"""The page of a study of language models: one HTML file from its results.json, without any request.

What is None or missing is shown as "-" or with the reason; it is never left out, and never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.study.page import layout
from pretrain.study.page.layout import Section
from pretrain.study.page.sections import overview
from pretrain.study.page.sections.losses import losses
from pretrain.study.page.sections.methods import methods
from pretrain.study.page.sections.protocol import protocol
from pretrain.study.page.sections.prototypes import lengths, projections, variances
from pretrain.study.page.sections.radars import radars
from pretrain.study.page.sections.sizes import sizes
from pretrain.study.page.sections.study import Study
from pretrain.study.page.sections.table import table
from pretrain.study.page.sections.trials import trials


def page(results: Mapping[str, Any]) -> str:
    """The HTML of a study. `results`: as in its results.json, of which any figure may be None."""
    study = Study(results)
    outcome = overview.findings(study) + overview.differences(study) + table(study)
    sections = [
        Section("results", "Results", "What came out", outcome),
        Section("sizes", "Sizes", "Size by size", sizes(study)),
        Section("protocol", "Protocol", "How settings were chosen", protocol(study)),
        Section("trials", "Trials", "What was tried", trials(study)),
        Section("loss", "Loss", "Loss", losses(study)),
        Section("radar", "Radar", "Quality, interpretability, sustainability", radars(study)),
        Section("variance", "Variance", "Where the variance of the prototypes lies", variances(study)),
        Section("projection", "Projections", "The prototypes in a plane", projections(study)),
        Section("norms", "Lengths", "Lengths of the prototypes over training", lengths(study)),
        Section("methods", "Methods and limits", "How it was done", methods(study)),
    ]
    return layout.document(
        study.title,
        overview.lede(study),
        overview.budget(study),
        sections,
        study.names,
        overview.footer(study),
    )
