//! Holes of files in a tar stream: GNU's old format, and its three in PAX headers.
//!
//! Invariant: a format that is not understood is an error: the bytes of a file are right,
//! or there is none.
//!
//! Source: GNU tar's manual, "Storing Sparse Files" (old GNU, PAX 0.0, 0.1, 1.0).

use super::pax::{decimal, Records};

/// Bytes of a tar's block.
pub const BLOCK: u64 = 512;
/// Most pieces of data of one file.
pub const MAX_PIECES: usize = 65_536;

/// A piece of a file that is data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where in the file.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// What a PAX header says of holes.
#[derive(Debug, PartialEq, Eq)]
pub enum InPax {
    /// Nothing.
    None,
    /// The size of the file, and its pieces (0.0 and 0.1).
    Pieces(u64, Vec<Piece>),
    /// The size of the file; the pieces are said before the data (1.0).
    Before(u64),
}

/// Reads what a PAX header says.
///
/// # Errors
/// A sentence.
pub fn in_pax(records: &Records) -> Result<InPax, String> {
    let unknown = |what: &str| format!("holes in a form that is not known ({what})");
    let mut listed: Vec<(&[u8], &[u8])> = Vec::new();
    let mut any = false;
    for (key, value) in records.all() {
        match key {
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => listed.push((key, value)),
            b"GNU.sparse.major"
            | b"GNU.sparse.minor"
            | b"GNU.sparse.name"
            | b"GNU.sparse.realsize"
            | b"GNU.sparse.size"
            | b"GNU.sparse.numblocks"
            | b"GNU.sparse.map" => {}
            b"SCHILY.realsize" | b"SUN.holesdata" => {
                return Err(unknown(&String::from_utf8_lossy(key)));
            }
            key if key.starts_with(b"GNU.sparse.") => {
                return Err(unknown(&String::from_utf8_lossy(key)));
            }
            _ => continue,
        }
        any = true;
    }
    if !any {
        return Ok(InPax::None);
    }
    let version = (records.number("GNU.sparse.major")?, records.number("GNU.sparse.minor")?);
    let size = match records.number("GNU.sparse.realsize")? {
        Some(size) => Some(size),
        None => records.number("GNU.sparse.size")?,
    };
    let size = size.ok_or_else(|| unknown("without a size"))?;
    let pieces = match version {
        (Some(1), Some(0)) => return Ok(InPax::Before(size)),
        (None, None) | (Some(0), Some(0 | 1)) => match records.last("GNU.sparse.map") {
            Some(map) => mapped(map),
            None => paired(&listed),
        },
        _ => return Err(unknown("of another version")),
    };
    let pieces = pieces.ok_or_else(|| unknown("with a list that is none"))?;
    match records.number("GNU.sparse.numblocks")? {
        Some(n) if n != pieces.len() as u64 => Err(unknown("with a list of another length")),
        _ => Ok(InPax::Pieces(size, pieces)),
    }
}

/// 0.1: `offset,length,offset,length`.
fn mapped(map: &[u8]) -> Option<Vec<Piece>> {
    let numbers = map.split(|b| *b == b',').map(decimal).collect::<Option<Vec<u64>>>()?;
    paired_up(&numbers)
}

/// 0.0: one record for each number, in turn.
fn paired(listed: &[(&[u8], &[u8])]) -> Option<Vec<Piece>> {
    let mut numbers = Vec::new();
    for (n, (key, value)) in listed.iter().enumerate() {
        let wanted: &[u8] = if n % 2 == 0 { b"GNU.sparse.offset" } else { b"GNU.sparse.numbytes" };
        numbers.push(decimal(value).filter(|_| *key == wanted)?);
    }
    paired_up(&numbers)
}

fn paired_up(numbers: &[u64]) -> Option<Vec<Piece>> {
    let whole = numbers.len() % 2 == 0 && numbers.len() / 2 <= MAX_PIECES;
    let pair = |p: &[u64]| Piece { offset: p[0], length: p[1] };
    whole.then(|| numbers.chunks_exact(2).map(pair).collect())
}

/// The list before the data (1.0), as it is read block by block: a count, then offsets and
/// lengths, each with a line feed.
#[derive(Debug, Default)]
pub struct Listed {
    text: Vec<u8>,
    numbers: Vec<u64>,
}

impl Listed {
    /// Takes a block; the pieces, once they are all there.
    ///
    /// # Errors
    /// A sentence.
    pub fn push(&mut self, block: &[u8]) -> Result<Option<Vec<Piece>>, String> {
        for byte in block {
            if *byte != b'\n' {
                // Longer than any number of 64 bits.
                if self.text.len() >= 20 {
                    return Err("a list of holes with a number that is none".into());
                }
                self.text.push(*byte);
                continue;
            }
            let number = decimal(&self.text).ok_or("a list of holes with a number that is none")?;
            self.text.clear();
            self.numbers.push(number);
            let count = self.numbers[0];
            if count > MAX_PIECES as u64 {
                return Err(format!("{count} pieces of data in one file, of at most {MAX_PIECES}"));
            }
            if self.numbers.len() as u64 == 1 + 2 * count {
                return Ok(paired_up(&self.numbers[1..]));
            }
        }
        Ok(None)
    }
}

/// Whether pieces lie in a file of `size` one after the other, and are `stored` bytes.
///
/// # Errors
/// A sentence.
pub fn check(pieces: &[Piece], stored: u64, size: u64) -> Result<(), String> {
    let (mut at, mut sum) = (0u64, 0u64);
    let mut part = false;
    for piece in pieces {
        let end = piece.offset.checked_add(piece.length).filter(|end| *end <= size);
        let Some(end) = end.filter(|_| piece.offset >= at) else {
            return Err("pieces of data that overlap, or lie behind the file's end".into());
        };
        // Only the last one may end within a block: what follows is not told otherwise.
        if part && piece.length > 0 {
            return Err("pieces of data that end within a block".into());
        }
        part |= piece.length % BLOCK != 0;
        // Smaller than their end, which fits.
        sum += piece.length;
        at = end;
    }
    match sum == stored {
        true => Ok(()),
        false => Err(format!("pieces of {sum} bytes where there are {stored}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(pairs: &[(&str, &str)]) -> Records {
        let mut text = String::new();
        for (key, value) in pairs {
            let rest = format!(" {key}={value}\n");
            let length = (1..).find(|n: &usize| n.to_string().len() + rest.len() == *n).unwrap();
            text.push_str(&format!("{length}{rest}"));
        }
        Records::parse(text.into_bytes()).unwrap()
    }

    const TWO: [Piece; 2] = [Piece { offset: 0, length: 512 }, Piece { offset: 4096, length: 10 }];

    #[test]
    fn the_three_forms_in_pax_headers_are_read() {
        assert_eq!(in_pax(&records(&[("path", "x")])).unwrap(), InPax::None);
        let zero = records(&[
            ("GNU.sparse.size", "5000"),
            ("GNU.sparse.numblocks", "2"),
            ("GNU.sparse.offset", "0"),
            ("GNU.sparse.numbytes", "512"),
            ("GNU.sparse.offset", "4096"),
            ("GNU.sparse.numbytes", "10"),
        ]);
        assert_eq!(in_pax(&zero).unwrap(), InPax::Pieces(5000, TWO.to_vec()));
        let one = [
            ("GNU.sparse.size", "5000"),
            ("GNU.sparse.numblocks", "2"),
            ("GNU.sparse.map", "0,512,4096,10"),
            ("GNU.sparse.name", "x"),
        ];
        assert_eq!(in_pax(&records(&one)).unwrap(), InPax::Pieces(5000, TWO.to_vec()));
        let before =
            [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "5000")];
        assert_eq!(in_pax(&records(&before)).unwrap(), InPax::Before(5000));
        let mut listed = Listed::default();
        assert_eq!(listed.push(b"2\n0\n51").unwrap(), None);
        assert_eq!(listed.push(b"2\n4096\n10\n\0\0\0").unwrap(), Some(TWO.to_vec()));
    }

    #[test]
    fn forms_that_are_not_understood_are_errors() {
        let bad: [&[(&str, &str)]; 8] = [
            &[("GNU.sparse.major", "2"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "1")],
            &[("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")],
            &[("GNU.sparse.size", "9"), ("GNU.sparse.map", "0")],
            &[("GNU.sparse.size", "9"), ("GNU.sparse.map", "0,1,x,1")],
            &[("GNU.sparse.size", "9"), ("GNU.sparse.numblocks", "2"), ("GNU.sparse.map", "0,1")],
            &[("GNU.sparse.size", "9"), ("GNU.sparse.numbytes", "1"), ("GNU.sparse.offset", "0")],
            &[("GNU.sparse.size", "9"), ("GNU.sparse.zebra", "1")],
            &[("SCHILY.realsize", "9")],
        ];
        for pairs in bad {
            assert!(in_pax(&records(pairs)).is_err(), "{pairs:?}");
        }
        assert!(Listed::default().push(b"65537\n").is_err());
        assert!(Listed::default().push(b"-1\n").is_err());
        assert!(Listed::default().push(&[b'1'; 30]).is_err());
    }

    #[test]
    fn pieces_must_lie_in_their_file() {
        let piece = |offset, length| Piece { offset, length };
        assert!(check(&TWO, 522, 5000).is_ok());
        assert!(check(&[], 0, 5000).is_ok());
        assert!(check(&[piece(0, 512), piece(5000, 0)], 512, 5000).is_ok());
        for (pieces, stored, size) in [
            (vec![piece(0, 512), piece(100, 512)], 1024, 5000),
            (vec![piece(512, 512), piece(0, 512)], 1024, 5000),
            (vec![piece(0, 513), piece(1024, 512)], 1025, 5000),
            (vec![piece(4900, 512)], 512, 5000),
            (vec![piece(u64::MAX, 512)], 512, u64::MAX),
            (vec![piece(0, 512)], 100, 5000),
        ] {
            assert!(check(&pieces, stored, size).is_err(), "{pieces:?}");
        }
    }
}
