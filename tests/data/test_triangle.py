""" Triangle against independent computations from its pixels. """
import numpy as np
import pytest
from PIL import Image

from timm.data import create_dataset

from timm_ait.data.triangle import CLASSES, triangles, write_triangle


class TestTriangle:

    def test_labels_agree_with_the_pixels(self):
        images, labels, vertices = triangles(0, np.arange(300))
        for image, label, centres in zip(images, labels, vertices):
            dots = np.argwhere(image == 255)[:, ::-1].astype(float)
            # midpoints of the clusters of pixels, found without the vertices, by single linkage
            clusters = []
            for dot in dots:
                is_near = [min(np.hypot(*(dot - other)) for other in cluster) < 6.5 for cluster in clusters]
                merged = [dot, *(d for cluster, near in zip(clusters, is_near) if near for d in cluster)]
                clusters = [cluster for cluster, near in zip(clusters, is_near) if not near] + [merged]
            assert len(clusters) == 3
            a, b, c = midpoints = [np.mean(cluster, axis=0) for cluster in clusters]
            assert all(np.linalg.norm(centres - midpoint, axis=1).min() < 1 for midpoint in midpoints)
            sides = [np.hypot(*(p - q)) for p, q in ((a, b), (b, c), (c, a))]
            difference = (max(sides) - min(sides)) / np.mean(sides)
            assert CLASSES[label] == ('equilateral' if difference < 0.09 else 'other'), (difference, label)

    def test_a_split_without_a_class_which_timm_would_miss_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match='--validation: too few, timm would miss the class equilateral'):
            write_triangle(tmp_path, 0, 8, 1)

    def test_a_sample_depends_on_seed_and_index_alone(self):
        images, labels, _ = triangles(3, np.array([7, 1, 40]))
        alone, label, _ = triangles(3, np.array([40]))
        assert np.array_equal(images[2], alone[0]) and labels[2] == label[0]
        assert not np.array_equal(triangles(4, np.array([40]))[0], alone)

    def test_the_folder_is_what_train_py_takes(self, tmp_path):
        write_triangle(tmp_path, 0, 30, 12)
        for split, indices in (('train', range(30)), ('validation', range(50_000, 50_012))):
            images, labels, _ = triangles(0, np.array(indices))
            dataset = create_dataset('', str(tmp_path), split=split)
            assert dataset.reader.class_to_idx == {name: i for i, name in enumerate(CLASSES)}
            files = {int(file.stem): file for file in (tmp_path / split).rglob('*.png')}
            assert sorted(files) == list(indices) and len(dataset) == len(indices)
            for index, image, label in zip(indices, images, labels):
                assert np.array_equal(np.asarray(Image.open(files[index])), image)
                assert files[index].parent.name == CLASSES[label]
