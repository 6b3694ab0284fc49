"""Several processes and machines: one edit by many ranks, and many jobs through a scheduler."""

from torch_prepared.cluster._group import Group, join_group, launched_ranks
from torch_prepared.cluster.collect import Collected, collect_jobs
from torch_prepared.cluster.job import JobFolder, JobResult, JobSpec, JobState, Resources
from torch_prepared.cluster.submit import available_cluster, submit_job, wait_for
from torch_prepared.cluster.team import TOLD, RankTeam, join_team

__all__ = [
    "TOLD",
    "Collected",
    "Group",
    "JobFolder",
    "JobResult",
    "JobSpec",
    "JobState",
    "RankTeam",
    "Resources",
    "available_cluster",
    "collect_jobs",
    "join_group",
    "join_team",
    "launched_ranks",
    "submit_job",
    "wait_for",
]
