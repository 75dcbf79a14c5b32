//! Durations for people, as they are given: `90d`, `1h 30m`, `250ms`. No months and years, whose lengths vary, so that what is
//! printed can be given again and means the same.

use std::time::Duration;

pub fn text(duration: Duration) -> String {
    const UNITS: [(u128, &str); 6] = [
        (86_400_000_000, "d"),
        (3_600_000_000, "h"),
        (60_000_000, "m"),
        (1_000_000, "s"),
        (1000, "ms"),
        (1, "us"),
    ];
    let mut left = duration.as_micros();
    let mut parts = Vec::new();
    for (length, unit) in UNITS {
        if left >= length {
            parts.push(format!("{}{unit}", left / length));
            left %= length;
        }
    }
    if parts.is_empty() { "0s".to_owned() } else { parts.join(" ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_printed_as_it_is_given_and_can_be_read_again() {
        for given in ["90d", "36525d", "1h 30m", "5s", "100ms", "1s 500ms", "0s", "7d 1us"] {
            let duration = humantime::parse_duration(given).unwrap();
            assert_eq!(text(duration), given);
        }
        assert_eq!(text(Duration::from_secs(7_776_000)), "90d");
    }
}
