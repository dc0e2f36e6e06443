"""kernels/cores: the affinity, and what control groups leave of it."""

import pytest

from kernels import cores


def system(root, cgroup: str, **files: str):
    """A root folder with these control groups: ``mount__group__file=text``, the dot of a file's name as _."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        *folders, file = name.split("__")
        folder = (root / "sys" / "fs" / "cgroup").joinpath(*folders)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file.replace("cpu_", "cpu.", 1)).write_text(text)
    return root


ONE = {"cpu__cpu_cfs_quota_us": "-1", "cpu__cpu_cfs_period_us": "100000"}
TWO = "0::/slice/service\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/\n", {"cpu_max": "200000 100000"}, 2.0),
        ("0::/\n", {"cpu_max": "max 100000"}, None),
        (TWO, {"slice__service__cpu_max": "150000 100000"}, 1.5),
        (TWO, {"slice__cpu_max": "50000 100000", "slice__service__cpu_max": "150000 100000"}, 0.5),
        (TWO, {"slice__service__cpu_max": "max 100000", "slice__cpu_max": "300000 100000"}, 3.0),
        (TWO, {"other__cpu_max": "100000 100000"}, None),
        ("4:memory:/a\n3:cpuset:/b\n1:cpu:/\n", ONE, None),
        (
            "1:cpu:/a/b\n",
            {**ONE, "cpu__a__cpu_cfs_quota_us": "250000", "cpu__a__cpu_cfs_period_us": "100000"},
            2.5,
        ),
        (
            "3:cpu,cpuacct:/docker/of-the-host\n",
            {"cpu,cpuacct__cpu_cfs_quota_us": "200000", "cpu,cpuacct__cpu_cfs_period_us": "100000"},
            2.0,
        ),
        ("", {}, None),
    ],
)
def test_the_quota_is_the_least_of_all_groups_above(tmp_path, cgroup, files, quota) -> None:
    assert cores.cpu_quota(system(tmp_path, cgroup, **files)) == quota


@pytest.mark.parametrize(("quota", "usable"), [(None, 8), (2.0, 2), (1.5, 2), (0.25, 1), (64.0, 8)])
def test_cores_are_those_of_the_affinity_and_no_more_than_the_quota_pays_for(
    monkeypatch, quota, usable
) -> None:
    monkeypatch.setattr(cores, "affinity", lambda: set(range(8)))
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert cores.usable_cores() == usable
