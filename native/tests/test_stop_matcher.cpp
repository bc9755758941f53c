#include "mlx_serving/stop_matcher.hpp"

#include "check.hpp"

namespace {

using mlx_serving::StopMatcher;

void without_stops_everything_passes() {
  StopMatcher matcher({});
  std::string out;
  CHECK(!matcher.feed("abc", out));
  CHECK(out == "abc");
}

void the_first_complete_stop_wins() {
  StopMatcher matcher({"abcd", "bc"});
  std::string out;
  CHECK(matcher.feed("xabcd", out));
  CHECK(out == "xa");
}

void of_two_that_end_together_the_longer_wins() {
  StopMatcher matcher({"bc", "abc"});
  std::string out;
  CHECK(matcher.feed("xabc", out));
  CHECK(out == "x");
}

void no_more_is_held_than_needed() {
  StopMatcher matcher({"aab"});
  std::string out;
  CHECK(!matcher.feed("aaaa", out));
  CHECK(out == "aa");  // "aa" may still become "aab"
  CHECK(!matcher.feed("c", out));
  CHECK(out == "aaaac");
}

void flush_releases_what_was_held() {
  StopMatcher matcher({"abc"});
  std::string out;
  CHECK(!matcher.feed("ab", out));
  CHECK(out.empty());
  matcher.flush(out);
  CHECK(out == "ab");
}

}  // namespace

int main() {
  without_stops_everything_passes();
  the_first_complete_stop_wins();
  of_two_that_end_together_the_longer_wins();
  no_more_is_held_than_needed();
  flush_releases_what_was_held();
  CHECK(check::rejection([] { StopMatcher({"a", ""}); }) == "stops[1]: must not be empty");
  return check::result();
}
