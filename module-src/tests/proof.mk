# SPDX-License-Identifier: Apache-2.0
# The slow half of the proof: sanitizers, fuzzing, static analysis, the other architecture. Included by
# the Makefile where the tests are there.

.PHONY: sanitize

# The integration tests against a whole httpd with ASan, UBSan and APR's pool debugging. The first
# run builds that httpd from the distribution's sources.
SANITIZE_CACHE ?= $(B)/sanitize
SANITIZE_MPMS  ?= event worker prefork

$(B)/mod_handoff_short_lived.so: tests/sanitize/mod_handoff_short_lived.c Makefile | $(B)
	$(CC) $(CPPFLAGS) $(CFLAGS) $(WARN) $(STABLE) -fPIC -shared -o $@ $<

sanitize:
	PYTEST="$(PYTEST)" tests/sanitize/run "$(SANITIZE_CACHE)" $(SANITIZE_MPMS)

# libFuzzer (clang), for everything that reads or writes bytes of others and does without httpd. What
# it finds to be new is added to a copy of the corpus in build/; what breaks a promise stays in
# build/fuzz/ and is named. To keep what was learned: make fuzz-merge.
FUZZ_CC            ?= clang
SECONDS_PER_TARGET ?= 20
FUZZERS := path option envelope wire origin

.PHONY: fuzz fuzz-merge

$(B)/fuzz/%: tests/fuzz/fuzz_%.c tests/fuzz/fuzz.h tests/unit/peer.h $(PLAIN) $(HEADERS) Makefile tests/proof.mk
	@mkdir -p $(B)/fuzz/found-$*
	$(FUZZ_CC) -g -O1 $(WARN) $(STABLE) -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -I. \
	  -o $@ $< $(PLAIN) -pthread

fuzz: $(FUZZERS:%=$(B)/fuzz/%)
	@failed=0; for name in $(FUZZERS); do \
	  echo "# fuzz $$name for $(SECONDS_PER_TARGET) s"; \
	  $(B)/fuzz/$$name -max_total_time=$(SECONDS_PER_TARGET) -timeout=10 -max_len=4096 -verbosity=0 \
	    -print_final_stats=1 -artifact_prefix=$(B)/fuzz/crash-$$name- \
	    $(B)/fuzz/found-$$name tests/fuzz/corpus/$$name >$(B)/fuzz/$$name.log 2>&1 || { failed=1; \
	      grep -v '^stat::' $(B)/fuzz/$$name.log | tail -n 60; }; \
	  grep -E 'stat::(number_of_executed_units|new_units_added)' $(B)/fuzz/$$name.log; \
	done; exit $$failed

# As few files as cover what all of them do (which lines, not how often): the corpus is part of the sources.
fuzz-merge: $(FUZZERS:%=$(B)/fuzz/%)
	@for name in $(FUZZERS); do \
	  $(B)/fuzz/$$name -set_cover_merge=1 -use_counters=0 -max_len=4096 -verbosity=0 tests/fuzz/corpus/$$name $(B)/fuzz/found-$$name || exit 1; \
	done

# The other architecture of the hosts that are served.
ARM64_CACHE ?= $(B)/arm64

.PHONY: arm64

arm64:
	UNITS="$(UNITS)" tests/arm64 "$(ARM64_CACHE)"
