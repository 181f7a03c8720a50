"""Pairs of English words by relation, in the manner of the function-vector tasks (Todd et al., arXiv:2310.15213).

The pairs are short, common words, so that even small vocabularies have many of them as single tokens. A word's token is
that of the word after a blank, as it stands inside a text; words that take several tokens are left out and counted.
"""

from __future__ import annotations

from data.tokenizer import Tokenizer

Pairs = tuple[tuple[str, str], ...]


def _pairs(text: str) -> Pairs:
    words = text.split()
    return tuple(zip(words[::2], words[1::2], strict=True))


RELATIONS: dict[str, Pairs] = {
    "plural": _pairs("""
        file files  value values  name names  object objects  type types  class classes  function functions
        method methods  argument arguments  line lines  word words  number numbers  string strings  key keys
        list lists  module modules  test tests  error errors  message messages  system systems  year years  day days
        hour hours  book books  city cities  country countries  child children  man men  woman women  foot feet
        """),
    "past tense": _pairs("""
        use used  call called  return returned  make made  find found  write wrote  give gave  take took
        get got  go went  see saw  say said  come came  know knew  think thought  begin began  send sent  keep kept
        leave left  run ran  need needed  want wanted  work worked  start started  change changed  add added
        create created  open opened  close closed
        """),
    "participle": _pairs("""
        use using  call calling  return returning  set setting  make making  find finding  write writing
        give giving  take taking  read reading  go going  see seeing  say saying  come coming  run running
        start starting  change changing  add adding  create creating  open opening  close closing  test testing
        work working  pass passing
        """),
    "comparative": _pairs("""
        good better  bad worse  large larger  small smaller  big bigger  long longer  short shorter  high higher
        low lower  old older  new newer  young younger  early earlier  late later  fast faster  slow slower
        strong stronger  simple simpler  easy easier  hard harder  great greater  wide wider  few fewer  deep deeper
        """),
    "opposite": _pairs("""
        true false  open closed  first last  start end  input output  up down  left right  before after  high low
        large small  long short  old new  good bad  more less  always never  all none  same different  above below
        read write  add remove  success failure  upper lower  public private  early late  hot cold  black white
        """),
    "third person": _pairs("""
        use uses  call calls  return returns  set sets  make makes  find finds  write writes  give gives  take takes
        get gets  go goes  see sees  say says  come comes  know knows  run runs  need needs  contain contains
        start starts  change changes  add adds  create creates  allow allows  raise raises
        """),
    "adverb": _pairs("""
        direct directly  normal normally  explicit explicitly  automatic automatically  usual usually  final finally
        full fully  simple simply  exact exactly  similar similarly  possible possibly  current currently
        correct correctly  actual actually  recent recently  general generally  original originally  quick quickly
        clear clearly  complete completely
        """),
    "capital": _pairs("""
        France Paris  Germany Berlin  England London  Italy Rome  Spain Madrid  Russia Moscow  China Beijing
        Japan Tokyo  Egypt Cairo  Greece Athens  Austria Vienna  Ireland Dublin  Cuba Havana  Turkey Ankara
        Iran Tehran  Iraq Baghdad  Israel Jerusalem  Syria Damascus  Poland Warsaw  Canada Ottawa
        """),
    "gender": _pairs("""
        man woman  he she  him her  his hers  king queen  father mother  son daughter  brother sister  boy girl
        husband wife  uncle aunt  male female  prince princess  actor actress  men women  boys girls  sons daughters
        brothers sisters  grandfather grandmother  himself herself
        """),
    "nationality": _pairs("""
        France French  Germany German  England English  Italy Italian  Spain Spanish  Russia Russian  China Chinese
        Japan Japanese  Egypt Egyptian  Greece Greek  America American  Europe European  Ireland Irish  Turkey Turkish
        Iran Iranian  Israel Israeli  Poland Polish  Canada Canadian  India Indian  Africa African
        """),
}

# Whose nearest prototypes a report shows.
NEAREST = ("the", "not", "is", "two", "three", "value", "file", "good", "large", "man", "year", "French", "used")


def token_of(tokenizer: Tokenizer, word: str) -> int | None:
    """The single token of a word inside a text; None if it takes several."""
    ids = tokenizer.encode(f" {word}")
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_id else None


def token_pairs(tokenizer: Tokenizer, pairs: Pairs) -> list[tuple[int, int]]:
    """The pairs whose words are both single tokens, as tokens."""
    tokens = [(token_of(tokenizer, first), token_of(tokenizer, second)) for first, second in pairs]
    return [(first, second) for first, second in tokens if first is not None and second is not None]
