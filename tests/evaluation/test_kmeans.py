"""k-means on points whose groups are known."""

from __future__ import annotations

import torch

from flsl_d2.evaluation.partitions import adjusted_rand_index, kmeans


def test_finds_far_groups_whatever_the_seed() -> None:
    groups = torch.arange(5).repeat_interleave(20)[torch.randperm(100)]
    points = 10 * torch.eye(5, 8)[groups] + 0.1 * torch.randn(100, 8)
    for seed in range(5):
        labels = kmeans(points, 5, seed)
        assert adjusted_rand_index(groups.numpy(), labels.numpy()) == 1


def test_same_seed_same_labels() -> None:
    points = torch.randn(200, 4)
    assert torch.equal(kmeans(points, 7, [3, 1]), kmeans(points, 7, [3, 1]))


def test_each_point_is_in_its_nearest_cluster() -> None:
    points = torch.randn(100, 3)
    labels = kmeans(points, 6, 0, max_iterations=500)
    centroids = torch.stack([points[labels == i].mean(dim=0) for i in range(6)])
    assert torch.equal(torch.cdist(points, centroids).argmin(dim=1), labels)


def test_fewer_points_than_clusters() -> None:
    assert kmeans(torch.ones(4, 3), 2, 0).tolist() == [0, 0, 0, 0]
    assert len(kmeans(torch.eye(3), 9, 0).unique()) == 3
