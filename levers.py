"""The changes to a recipe that ablate.py tries: settings of train.py, by a name for people."""

from typing import Any

RECIPE = "recipe"

LEVERS: dict[str, dict[str, Any]] = {
    RECIPE: {},
    "plain shuffling": {"tau": 0.0},
    "all classes equally often": {"tau": 1.0},
    "inverse class weights": {"class_weights": "inverse", "tau": 0.0},
    "effective class weights": {"class_weights": "effective", "tau": 0.0},
    "focal loss": {"loss": "focal"},
    "LDAM, deferred weights": {"loss": "ldam", "class_weights": "effective", "tau": 0.0},
    "balanced softmax": {"loss": "balanced_softmax", "tau": 0.0},
    "logit adjustment": {"loss": "logit_adjustment", "tau": 0.0, "adjustment_tau": 0.5},
    "label smoothing": {"label_smoothing": 0.1},
    "no label smoothing": {"label_smoothing": 0.0},
    "averaged weights": {"ema": 0.98},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    "slower early stages": {"layer_decay": 0.7},
    "frozen BatchNorm": {"freeze_batchnorm": True},
    "stochastic depth": {"drop_path": 0.1},
    "RandAugment": {"rand_augment": 2},
    "random erasing": {"erasing": 0.25},
    "no augmentation": {
        **dict.fromkeys(("flip", "rotation", "translate", "zoom"), 0.0),
        **dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0),
    },
    "4 frames": {"n_frames": 4},
    "8 frames": {"n_frames": 8},
    "16 frames": {"n_frames": 16},
    "32 frames": {"n_frames": 32},
    "2 views": {"test_views": 2},
    "2 views x 3 crops": {"test_views": 2, "test_crops": 3},
    "LSTM": {"lstm_layers": 1, "temporal_pooling": "mean"},
    "attention": {"temporal_pooling": "attention"},
    "mean over time": {"temporal_pooling": "mean"},
    "2 x 2 parts of the picture": {"grid": 2},
    "ResNet-50": {"backbone": "resnet50"},
    "ConvNeXt-Tiny": {"backbone": "convnext_tiny"},
    "EfficientNet-Lite0": {"backbone": "efficientnet_lite0"},
    "gradients alone": {"inputs": "gradients"},
    "flow alone": {"inputs": "flow"},
    "vectors alone": {"inputs": "vectors"},
    "+ gradients": {"inputs": "rgb+gradients"},
    "+ gradients, early": {"inputs": "rgb+gradients", "fusion": "early"},
    "+ flow": {"inputs": "rgb+flow"},
    "+ flow summary": {"inputs": "rgb+flow", "fusion": "summary"},
    "+ vectors": {"inputs": "rgb+vectors"},
    "+ vectors summary": {"inputs": "rgb+vectors", "fusion": "summary"},
}

ADJUSTED = {"adjusted afterwards, 0.5": 0.5, "adjusted afterwards, 1": 1.0}
"""levers that need no training: the recipe's answers, `evaluate.py --adjust` so much"""
