"""Build `clipkit/assets/english.json`, the vocabulary that stands in where no other can be had.

The text is WordNet 3.0, its glosses (definitions and example sentences) and the words that each of
them defines, and a list of words that captions use far more often than definitions do. On Debian

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet
    python experiments/build_english_vocabulary.py \
        wordnet/usr/share/wordnet clipkit/assets/english.json

and elsewhere the `dict` folder of WordNet-3.0.tar.gz from wordnet.princeton.edu does. It takes half
a minute; the same text and size give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path

from clipkit.tokenizer_training import train_tokenizer

# Read a hundred times over: often enough that each word becomes one token.
CAPTION_WORDS = """
photo photos picture pictures image images photograph emoji drawing painting sketch doodle
illustration cartoon comic logo icon sign symbol flag rendering render sculpture statue origami
tattoo toy plush plushie embroidered graffiti poster sticker screenshot portrait landscape closeup
close-up blurry cropped pixelated low-resolution black-and-white grayscale red green blue yellow
orange purple violet pink brown black white gray grey cyan magenta teal turquoise beige gold golden
silver maroon navy olive lime indigo crimson scarlet tan lavender lilac peach coral mint khaki
ivory dark light bright pale colorful colourful striped dotted checkered spotted plain shiny circle
square triangle rectangle star hexagon pentagon octagon diamond ellipse oval cross ring cube sphere
cylinder cone pyramid crescent polygon heart arrow trapezoid rhombus semicircle spiral shape
background foreground small tiny large big huge medium long short tall wide narrow round left right
top bottom middle center centre above below under behind beside between inside outside near front
back upper lower corner one two three four five six seven eight nine ten several many few dog dogs
puppy cat cats kitten horse horses cow cows sheep pig goat bird birds parrot pigeon fish lion tiger
elephant giraffe zebra monkey gorilla bear bears rabbit mouse hamster rat snake turtle tortoise
frog lizard crocodile dinosaur duck chicken rooster goose penguin owl eagle flamingo peacock whale
dolphin shark octopus butterfly bee ladybug ant spider snail crab lobster shrimp camel kangaroo
koala panda fox wolf deer squirrel raccoon hedgehog beaver otter sloth hippo rhino unicorn dragon
apple apples banana bananas pear grape grapes lemon mango pineapple strawberry strawberries
blueberry raspberry cherry melon watermelon kiwi avocado nectarine plum pomegranate papaya coconut
tomato tomatoes potato potatoes carrot carrots onion garlic pepper cucumber lettuce cabbage
broccoli cauliflower spinach zucchini eggplant aubergine asparagus mushroom ginger leek corn
pumpkin bread toast bagel croissant cheese milk yogurt yoghurt juice butter cream egg eggs rice
pasta spaghetti noodles pizza burger hamburger sandwich hotdog taco burrito sushi soup salad fries
steak bacon sausage cake cookie cookies donut pancake waffle pie chocolate candy popcorn coffee tea
beer wine cocktail water oat soy package carton bottle man men woman women boy girl child children
kid people person baby crowd family player standing sitting lying running walking jumping smiling
laughing crying grinning winking frowning kissing waving holding wearing carrying playing looking
watching riding eating drinking sleeping swimming climbing flying driving cooking reading dancing
surfing skiing skating face hand hands finger thumb eye eyes mouth nose ear hair beard head arm leg
foot skin tone keycap button shirt t-shirt jacket coat hat cap helmet dress skirt pants jeans
shorts shoe shoes boots sneakers sandals socks glasses sunglasses backpack handbag purse suitcase
tie scarf gloves watch necklace umbrella car cars truck van bus taxi bicycle bike motorcycle
scooter train tram airplane plane helicopter rocket boat ship tractor ambulance street road
sidewalk traffic bridge house building tower church castle skyscraper window door fence wall tree
trees grass flower flowers rose tulip sunflower leaf leaves plant mountain mountains hill beach
ocean sea lake river snow sky cloud clouds sun moon rain rainbow lightning sunset sunrise field
park forest desert island table chair couch sofa bed desk lamp kitchen bathroom bedroom toilet sink
oven microwave refrigerator phone smartphone cellphone laptop computer keyboard monitor television
tv camera clock book books bowl plate cup mug fork knife spoon vase scissors hammer key pen pencil
balloon candle guitar piano violin drum trumpet ball baseball soccer football tennis basketball
volleyball golf racket bat frisbee kite skateboard surfboard snowboard skis bench stadium court
game team
"""


def main() -> None:
    """Read the folder and write the vocabulary."""
    parser = argparse.ArgumentParser(description="Build the English vocabulary.")
    parser.add_argument("wordnet", type=Path, help="folder with data.noun, .verb, .adj and .adv")
    parser.add_argument("output", type=Path)
    parser.add_argument("--vocab_size", type=int, default=16_384)
    arguments = parser.parse_args()
    definition = train_tokenizer(entries(arguments.wordnet), vocab_size=arguments.vocab_size)
    arguments.output.write_text(definition + "\n", encoding="utf-8")
    print(arguments.output, hashlib.sha256(definition.encode()).hexdigest())


def entries(folder: Path) -> Iterator[str]:
    """Yield the words and the gloss of each synonym set (see wndb(5WN)), then `CAPTION_WORDS`."""
    for part_of_speech in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part_of_speech}").read_text("utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields, gloss = line.split(" | ", 1)
            _, _, _, num_words, *rest = fields.split(" ")
            words = rest[: 2 * int(num_words, 16) : 2]
            # An adjective may end in its position, as in "galore(ip)".
            yield " ".join(word.split("(")[0].replace("_", " ") for word in words)
            yield gloss
    yield from [CAPTION_WORDS] * 100


if __name__ == "__main__":
    main()
