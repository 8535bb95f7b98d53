//! Sizes as people type and read them: powers of 1024, `10G` = `10GiB`.
//! Parsing is exact: a fraction that does not come to whole bytes is refused, as is everything beyond 64 bits.

use blockfork::error::{Error, ErrorKind, Result};

const UNITS: [&str; 7] = ["B", "K", "M", "G", "T", "P", "E"];

/// The number of bytes that `text` means.
pub(crate) fn parse(text: &str) -> Result<u64> {
    let refuse = |fact: &str| {
        let shown: String = text.chars().take(40).collect();
        Err(Error::with(
            ErrorKind::Invalid,
            format!("size {shown:?}: {fact}; write a number with K, M, G, T or P, as in 10G"),
        ))
    };
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let power = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KIB" => 1,
        "M" | "MIB" => 2,
        "G" | "GIB" => 3,
        "T" | "TIB" => 4,
        "P" | "PIB" => 5,
        "E" | "EIB" => 6,
        "KB" | "MB" | "GB" | "TB" | "PB" | "EB" => {
            return refuse("this unit means 1000 to some and 1024 to others");
        }
        _ => return refuse("is not a size"),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') || (number.contains('.') && fraction.is_empty()) {
        return refuse("is not a size");
    }
    if whole.len() > 20 || fraction.len() > 15 {
        return refuse("has too many digits");
    }
    let (Ok(whole), Ok(numerator)) = (
        whole.parse::<u128>(),
        format!("0{fraction}").parse::<u128>(),
    ) else {
        return refuse("is not a size");
    };
    let unit_bytes = 1_u128 << (10 * power);
    let denominator = 10_u128.pow(u32::try_from(fraction.len()).unwrap_or(0));
    let part = numerator * unit_bytes;
    if !part.is_multiple_of(denominator) {
        return refuse("does not come to whole bytes");
    }
    let Ok(bytes) = u64::try_from(whole * unit_bytes + part / denominator) else {
        return refuse("is too large");
    };
    if bytes == 0 {
        return refuse("is zero");
    }
    Ok(bytes)
}

/// `bytes` for people: rounded to two decimals, so that [`parse`] may refuse it.
pub(crate) fn human(bytes: u64) -> String {
    let mut power = 0;
    while power + 1 < UNITS.len() && bytes >> (10 * (power + 1)) > 0 {
        power += 1;
    }
    let unit = UNITS.get(power).copied().unwrap_or("B");
    let unit_bytes = 1_u128 << (10 * power);
    let hundredths = (u128::from(bytes) * 100 + unit_bytes / 2) / unit_bytes;
    let (whole, rest) = (hundredths / 100, hundredths % 100);
    match (rest, rest % 10) {
        (0, _) => format!("{whole}{unit}"),
        (_, 0) => format!("{whole}.{}{unit}", rest / 10),
        _ => format!("{whole}.{rest:02}{unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024() {
        for (text, bytes) in [
            ("4096", 4096),
            ("4096B", 4096),
            ("10G", 10 << 30),
            ("10GiB", 10 << 30),
            ("10gib", 10 << 30),
            ("1.5M", 3 << 19),
            ("0.5K", 512),
            ("1P", 1 << 50),
            ("15E", 15 << 60),
        ] {
            assert_eq!(parse(text).unwrap(), bytes, "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_in_one_line_that_names_it() {
        for text in [
            "",
            "0",
            "0G",
            "G",
            "-1",
            "+1",
            "1e9",
            "10GB",
            "1 G",
            ".5G",
            "1.",
            "1.2.3G",
            "0.3K",
            "16E",
            "1X",
            "0x10",
            "99999999999999999999999",
            "1\nG",
            "\u{0661}G",
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{text:?}");
            let message = error.to_string();
            assert!(
                message.starts_with(&format!("size {text:?}: ")),
                "{message}"
            );
            assert!(!message.contains('\n'));
        }
    }

    #[test]
    fn what_people_read_has_two_decimals_at_most() {
        for (bytes, text) in [
            (0, "0B"),
            (512, "512B"),
            (1 << 30, "1G"),
            (3 << 29, "1.5G"),
            ((1 << 30) + (1 << 20) * 52, "1.05G"),
            (u64::MAX, "16E"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
