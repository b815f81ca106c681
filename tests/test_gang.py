"""One job on the GPUs of two nodes: a Ray cluster of two, whose GPUs are only numbers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bells_fixtures import is_gone
from house import House, open_house
from tunesmith.work.gang import Gang, here, split


@pytest.mark.parametrize(
    ("gpus", "nodes", "over"),
    [(1, [1], 1), (2, [1, 1], 2), (2, [2, 1], 1), (4, [1, 2, 2], 2), (3, [2, 2], 0), (16, [8], 0)],
)
def test_a_job_goes_over_the_fewest_nodes_that_have_as_many_each(
    gpus: int, nodes: list[int], over: int
) -> None:
    assert split(gpus, nodes) == over


def test_the_first_node_claims_for_all_and_uses_its_own() -> None:
    gpus = Gang(3, "10.0.0.1:9").gpus((4, 5))
    assert len(set(gpus)) == 6
    assert here(gpus) == [4, 5]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1})
    try:
        cluster.add_node(num_cpus=2, num_gpus=1)
        folder = tmp_path_factory.mktemp("gang")
        over = {"TUNESMITH_RAY_ADDRESS": cluster.address}
        with open_house(folder, ("api", "--bell", "ray"), **over) as opened:
            with opened.client as client:
                opened.wait(lambda: client.get("/health").json()["workers"] == 1)
            yield opened
    finally:
        cluster.shutdown()


@pytest.mark.timeout(600)  # a cluster of two, on a busy machine
def test_a_job_of_two_gpus_trains_on_two_nodes(house: House) -> None:
    job_id = house.submit(devices=2, num_epochs=1)
    job = house.wait_end(job_id)
    log = Path(house.workspace / job["log_file"])
    assert job["state"] == "succeeded", log.read_text() if log.exists() else job
    started = house.wait_event(job_id, "started")["data"]
    assert started["plan"]["processes"] == 2
    assert started["total_steps"] == 8


@pytest.mark.timeout(600)
def test_cancelled_it_ends_on_both(house: House) -> None:
    job_id = house.submit(devices=2, num_epochs=10_000)
    house.wait_event(job_id, "step")
    trainers = house.children("tunesmith.train.launch")
    with house.client as client:
        client.post(f"/jobs/{job_id}/cancel")
    assert house.wait_end(job_id)["status"] == "cancelled"
    assert trainers
    house.wait(lambda: all(is_gone(trainer) for trainer in trainers))
