"""Words of the tasks: short, common, and one token for most tokenizers."""

from __future__ import annotations

#: whom a fact is about
KEYS = (
    "baker", "doctor", "farmer", "sailor", "painter", "teacher", "pilot", "hunter", "singer", "lawyer", "miner", "tailor",
    "poet", "soldier", "merchant", "nurse", "captain", "fisherman", "carpenter", "gardener", "actor", "banker", "barber",
    "dancer", "driver", "judge", "mayor", "monk", "priest", "waiter",
)  # fmt: skip
#: what is said
VALUES = (
    "apple", "river", "silver", "dragon", "mountain", "violin", "orange", "tiger", "window", "candle", "garden", "eagle",
    "pepper", "copper", "marble", "castle", "hammer", "ribbon", "diamond", "forest", "lemon", "pillow", "rocket", "saddle",
    "thunder", "turtle", "velvet", "wagon", "walnut", "winter", "basket", "bottle", "bridge", "butter", "camera", "carpet",
    "cherry", "coffee", "cotton", "desert", "engine", "falcon", "feather", "flower", "ginger", "guitar", "helmet", "honey",
    "island", "jacket", "kettle", "ladder", "lizard", "magnet", "mirror", "monkey", "needle", "ocean", "onion", "oyster",
    "palace", "parrot", "pencil", "planet", "potato", "pumpkin", "rabbit", "salmon", "shadow", "spider", "stone", "sugar",
    "temple", "ticket", "tomato", "tunnel", "turkey", "wallet", "whale", "wheat",
)  # fmt: skip
