// Made by dev/make_tokenizer_fixture.py: the number of tokens of the long text, and their hash.
enum { VOCAB_SIZE = 576, LONG = 200000, LONG_TOKENS = 147503 };
static const uint64_t LONG_HASH = 15456637472308401430u;
