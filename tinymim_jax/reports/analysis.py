"""The results of `tinymim analyze` as a section of a report."""

from collections.abc import Mapping
from typing import Any

from tinymim_jax.analysis.charts import analysis_charts, block_rows
from tinymim_jax.pages.page import details, figure, grid, paragraph, table


def analysis_section(analysis: Mapping[str, Any]) -> str:
    """Charts of CKA, attention, accuracy by block and relation KL, the suggested tap, and a table; "" for nothing."""
    if not analysis:
        return ""
    charts = [figure(chart.title, chart.svg, chart.note) for chart in analysis_charts(analysis)]
    tap = analysis.get("tap")
    suggestion = paragraph(f"Suggested tap: {tap['text']}") if tap else ""
    return paragraph(analysis["note"]) + suggestion + grid(charts) + details("Table", table(*block_rows(analysis)))
