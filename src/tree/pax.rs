//! The records of a PAX header: `LENGTH KEY=VALUE` and a line feed, in which a value may
//! have any bytes.
//!
//! Source: POSIX.1-2017, pax, "pax Extended Header".

/// Records in their order.
#[derive(Debug, Default)]
pub struct Records {
    bytes: Vec<u8>,
    /// Where a key begins, its value, and its end: half a million records take no more
    /// than their text does.
    places: Vec<[u32; 3]>,
}

impl Records {
    /// Reads them.
    ///
    /// # Errors
    /// A sentence.
    pub fn parse(mut bytes: Vec<u8>) -> Result<Records, String> {
        let bad = || "a PAX header with a record that is none".to_string();
        let narrow = |n: usize| u32::try_from(n).map_err(|_| bad());
        let (mut places, mut at) = (Vec::new(), 0);
        // Some fill the last block with zeros.
        while bytes.get(at).is_some_and(|b| *b != 0) {
            let rest = &bytes[at..];
            let space = rest.iter().take(20).position(|b| *b == b' ').ok_or_else(bad)?;
            let length = decimal(&rest[..space]).and_then(|n| usize::try_from(n).ok());
            let length = length.filter(|n| *n > space + 1 && *n <= rest.len()).ok_or_else(bad)?;
            let record = rest[space + 1..length].strip_suffix(b"\n").ok_or_else(bad)?;
            let equals = record.iter().position(|b| *b == b'=').ok_or_else(bad)?;
            let key = at + space + 1;
            places.push([narrow(key)?, narrow(key + equals + 1)?, narrow(at + length - 1)?]);
            at += length;
        }
        bytes.truncate(at);
        Ok(Records { bytes, places })
    }

    /// Their text, as it was read.
    pub fn text(&self) -> &[u8] {
        &self.bytes
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.places.iter().map(|place| {
            let [key, value, end] = place.map(|n| n as usize);
            (&self.bytes[key..value - 1], &self.bytes[value..end])
        })
    }

    /// The last one of a key, which counts; one that is empty takes back what was said.
    pub fn last(&self, key: &str) -> Option<&[u8]> {
        let found = self.all().filter(|(k, _)| *k == key.as_bytes()).last();
        found.map(|(_, value)| value).filter(|v| !v.is_empty())
    }

    /// A number.
    ///
    /// # Errors
    /// A sentence.
    pub fn number(&self, key: &str) -> Result<Option<u64>, String> {
        let read = |v| decimal(v).ok_or_else(|| format!("a PAX header whose {key} is no number"));
        self.last(key).map(read).transpose()
    }

    /// Seconds and billionths of one, perhaps before 1970.
    ///
    /// # Errors
    /// A sentence.
    pub fn time(&self, key: &str) -> Result<Option<(i64, u32)>, String> {
        let read = |v| time(v).ok_or_else(|| format!("a PAX header whose {key} is no time"));
        self.last(key).map(read).transpose()
    }
}

/// A record as it is written.
pub fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + b" =\n".len();
    // The length counts its own digits.
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length += 1;
    }
    [length.to_string().as_bytes(), b" ", key.as_bytes(), b"=", value, b"\n"].concat()
}

/// A decimal number and nothing else.
pub fn decimal(text: &[u8]) -> Option<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| digits)?.parse().ok()
}

fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let point = text.iter().position(|b| *b == b'.');
    let (whole, part) = match point {
        Some(at) => (&text[..at], &text[at + 1..]),
        None => (text, &[][..]),
    };
    let seconds = i64::try_from(decimal(whole)?).ok()?;
    let mut billionths = 0;
    for place in 0..9 {
        let digit = part.get(place).copied().unwrap_or(b'0');
        billionths = billionths * 10 + u32::from(digit.checked_sub(b'0').filter(|d| *d < 10)?);
    }
    Some(match (negative, billionths) {
        (false, _) => (seconds, billionths),
        (true, 0) => (-seconds, 0),
        (true, n) => (-seconds - 1, 1_000_000_000 - n),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &[u8]) -> Result<Records, String> {
        Records::parse(text.to_vec())
    }

    #[test]
    fn what_is_written_is_read() {
        for length in [0, 1, 87, 88, 89, 90, 985, 986, 987, 988] {
            let value = vec![b'v'; length];
            let records = Records::parse(record("mtime", &value)).unwrap();
            assert_eq!(records.all().next(), Some((&b"mtime"[..], &value[..])), "{length}");
        }
    }

    #[test]
    fn values_may_have_any_bytes() {
        let records = parse(b"12 path=a\nb\n11 size=42\n15 comment=x=y\n").unwrap();
        assert_eq!(records.last("path"), Some(&b"a\nb"[..]));
        assert_eq!(records.number("size").unwrap(), Some(42));
        assert_eq!(records.last("comment"), Some(&b"x=y"[..]));
        assert_eq!(records.last("uid"), None);
        // The last one counts, and an empty one takes back.
        let records = parse(b"9 path=a\n9 path=b\n8 path=\n").unwrap();
        assert_eq!(records.last("path"), None);
        assert!(parse(b"").unwrap().all().next().is_none());
    }

    #[test]
    fn records_that_are_none_are_errors() {
        let bad: [&[u8]; 8] = [
            b"path=a\n",
            b"5 a=b\n",
            b"99 path=a\n",
            b"0 a=b\n",
            b"6 ab\nx",
            b"18446744073709551616 a=b\n",
            b"-6 a=b\n",
            b" 6 a=b\n",
        ];
        for text in bad {
            assert!(parse(text).is_err(), "{:?}", String::from_utf8_lossy(text));
        }
        let wrong = parse(b"11 size=4x\n13 mtime=1,5\n").unwrap();
        assert!(wrong.number("size").is_err() && wrong.time("mtime").is_err());
    }

    #[test]
    fn times_have_parts_and_a_sign() {
        assert_eq!(time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(time(b"0"), Some((0, 0)));
        assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time(b"1.1234567899"), Some((1, 123_456_789)));
        assert_eq!(time(b"1.x"), None);
        assert_eq!(time(b""), None);
    }
}
