"""A saved W&B workspace: the paper's figures over the runs of a project, as they come in."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from randlora.errors import FINISHED, SettingsError

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


def workspace(entity: str, project: str, metric: str = "accuracy") -> Workspace:
    """Score against parameters, memory and time, learning curves and few-shot scores, runs grouped by method.

    Args:
        entity: W&B's account or team.
        project: Where the runs are, those of logger.wandb.project.
        metric: That of the tasks, without ``test/``.

    Raises:
        SettingsError: The package wandb-workspaces is missing.
    """
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise SettingsError(
            "wandb-workspaces is not installed: pip install 'randlora[dashboards]', or in a clone pip install "
            "-e '.[dashboards]'"
        ) from error
    score, by_method = f"test/{metric}", reports.Config("method.name")

    def against(cost: str, title: str) -> reports.ScatterPlot:
        return reports.ScatterPlot(
            title=title, x=reports.SummaryMetric(cost), y=reports.SummaryMetric(score), log_x=True,
            legend_template="${run:displayName}",
        )  # fmt: skip

    def over(name: str, title: str) -> reports.LinePlot:
        return reports.LinePlot(title=title, x="Step", y=[name], groupby=by_method, groupby_rangefunc="stddev")

    sections = [
        workspaces.Section(
            name="Score against cost",
            is_open=True,
            panels=[
                against("trainable_parameters", "Trained parameters"),
                against("peak_memory_bytes", "Peak memory, bytes"),
                against("seconds_per_step", "Seconds per step"),
            ],
        ),
        workspaces.Section(
            name="Scores",
            is_open=True,
            panels=[
                reports.BarPlot(
                    title="By method, mean of runs",
                    metrics=[reports.SummaryMetric(score)],
                    groupby=by_method,
                    groupby_aggfunc="mean",
                    groupby_rangefunc="stddev",
                    orientation="h",
                ),
                reports.ScatterPlot(
                    title="By images per class",
                    x=reports.Config("shots"),
                    y=reports.SummaryMetric(score),
                    legend_template="${run:displayName}",
                ),
            ],
        ),
        workspaces.Section(
            name="Training",
            is_open=True,
            panels=[over("train/loss", "Training loss"), over(f"validation/{metric}", "Validation")],
        ),
    ]
    grouped = workspaces.RunsetSettings(groupby=[workspaces.Config("method.name")])
    return workspaces.Workspace(
        name="randlora", entity=entity, project=project, sections=sections, runset_settings=grouped
    )


def main(arguments: Sequence[str]) -> int:
    """Saves the workspace in W&B, and prints its address."""
    parser = argparse.ArgumentParser(prog="randlora workspace", description=__doc__)
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="W&B's account or team, and the runs' project")
    parser.add_argument("--metric", default="accuracy", help="that of the tasks, such as matthews")
    options = parser.parse_args(arguments)
    entity, slash, project = options.project.partition("/")
    if not (entity and slash and project) or "/" in project:
        raise SettingsError(f"{options.project!r} is not ENTITY/PROJECT, such as my-team/randlora")
    saved = workspace(entity, project, options.metric)
    try:
        saved.save()
    except Exception as error:  # of the network, the account or the project, each with a class of its own
        raise SettingsError(f"W&B did not save the workspace: {str(error).splitlines()[0]}") from error
    print(saved.url)
    return FINISHED
