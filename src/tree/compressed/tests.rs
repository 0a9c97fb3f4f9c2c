//! Streams of the programs' own, whole, joined, damaged.
#![allow(clippy::disallowed_methods)] // They are started to be compared with.

use super::*;
use std::io::Write;
use std::process::{Command, Stdio};

fn through(program: &str, args: &[&str], bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    let mut stdin = child.stdin.take().unwrap();
    let out = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(bytes).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(out.status.success(), "{program} {args:?}");
    out.stdout
}

/// Comes in pieces that end anywhere.
struct Slow(io::Cursor<Vec<u8>>, usize);

impl Read for Slow {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.1 = self.1 * 7 % 61 + 1;
        let most = buffer.len().min(self.1);
        self.0.read(&mut buffer[..most])
    }
}

fn decompress(bytes: &[u8]) -> io::Result<(Format, Vec<u8>)> {
    let mut stream = Decompressed::new(Box::new(Slow(io::Cursor::new(bytes.to_vec()), 3)))?;
    let mut out = Vec::new();
    stream.read_to_end(&mut out)?;
    Ok((stream.format(), out))
}

/// Text that compresses, but not to nothing.
fn text(size: usize) -> Vec<u8> {
    let mut n = 12345u32;
    let mut next = || {
        n = n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        b"etaoin shrdlu"[(n >> 24) as usize % 13]
    };
    (0..size).map(|_| next()).collect()
}

const PROGRAMS: [(&str, &[&str], Format); 8] = [
    ("gzip", &["-c"], Format::Gzip),
    ("xz", &["-c"], Format::Xz),
    ("xz", &["-c", "-9e", "--check=sha256"], Format::Xz),
    ("xz", &["-c", "--block-size=70000", "--check=none"], Format::Xz),
    ("xz", &["-c", "--x86", "--lzma2=dict=1MiB"], Format::Xz),
    ("zstd", &["-c"], Format::Zstd),
    ("zstd", &["-c", "--ultra", "-22", "--no-check"], Format::Zstd),
    ("zstd", &["-c", "--long=27"], Format::Zstd),
];

#[test]
fn what_the_programs_write_is_read_alone_and_joined() {
    let (first, second) = (text(300_000), text(1000));
    for (program, args, format) in PROGRAMS {
        let one = through(program, args, &first);
        let two = through(program, args, &second);
        let (found, bytes) = decompress(&one).unwrap_or_else(|e| panic!("{program}: {e}"));
        assert!(found == format && bytes == first, "{program} {args:?}");
        let joined = [&one[..], &two, &one].concat();
        let (_, bytes) = decompress(&joined).unwrap_or_else(|e| panic!("{program}: {e}"));
        assert!(bytes == [&first[..], &second, &first].concat(), "{program} {args:?}");
        // What fills a medium's last block.
        let padded = [&one[..], &[0; 512]].concat();
        assert!(decompress(&padded).unwrap().1 == first, "{program} {args:?}");
    }
    let skipped = [&[0x51, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3][..]].concat();
    let frame = through("zstd", &["-c"], &first);
    let bytes = decompress(&[&skipped[..], &frame, &skipped].concat()).unwrap().1;
    assert!(bytes == first);
    assert_eq!(decompress(b"plain").unwrap(), (Format::Plain, b"plain".to_vec()));
    assert_eq!(decompress(b"").unwrap(), (Format::Plain, vec![]));
}

#[test]
fn damage_is_an_error_wherever_it_is() {
    let content = text(200_000);
    for (program, args, _) in PROGRAMS {
        let one = through(program, args, &content);
        for length in [7, 12, 20, 1000, one.len() / 2, one.len() - 1] {
            let e = decompress(&one[..length]);
            assert!(e.is_err(), "{program} {args:?}, {length} of {}", one.len());
        }
        for more in [&b"garbage"[..], &[0, 0, 0, 0, b'x'], &one[..one.len() - 5]] {
            let e = decompress(&[&one[..], more].concat());
            assert!(e.is_err(), "{program} {args:?}, {} bytes follow", more.len());
        }
        if args.iter().any(|a| a.contains("none") || a.contains("no-check")) {
            continue;
        }
        for at in (40..one.len()).step_by(one.len() / 40) {
            let mut changed = one.clone();
            changed[at] ^= 0x10;
            let same = decompress(&changed).is_ok_and(|(_, bytes)| bytes != content);
            assert!(!same, "{program} {args:?}, byte {at}: other bytes, and no error");
        }
    }
}

/// A decompressor that is asked once more after an error may never return.
#[test]
fn an_error_stays_one() {
    let blocks = through("xz", &["-c", "--block-size=1024"], &text(3000));
    let cut = blocks[..blocks.len() / 2 + 40].to_vec();
    let mut stream = Decompressed::new(Box::new(io::Cursor::new(cut))).unwrap();
    let first = stream.read_to_end(&mut Vec::new()).unwrap_err().to_string();
    assert!(first.contains("cut off"), "{first}");
    assert_eq!(stream.read(&mut [0; 100]).unwrap_err().to_string(), first);
}

#[test]
fn memory_is_bounded() {
    let content = text(100_000);
    let large = through("xz", &["-c", "--lzma2=dict=512MiB"], &content);
    let small = through("xz", &["-c"], &content);
    let e = decompress(&large).unwrap_err().to_string();
    assert!(e.contains("536870912 bytes of memory, of at most 134217728"), "{e}");
    // Behind others: another stream's, another block's.
    assert!(decompress(&[&small[..], &large].concat()).is_err());
    let blocks = through("xz", &["-c", "--block-size=30000", "--check=crc32"], &content);
    let mut watched = Watched::new(&blocks[..]);
    let mut all = Vec::new();
    watched.read_to_end(&mut all).unwrap();
    assert!(all == blocks);
    let size = 12 + 4 * (usize::from(blocks[12]) + 1);
    let filter = blocks[12..size].windows(2).position(|pair| pair == [0x21, 1]).unwrap() + 12;
    let at = blocks[size..].windows(filter - 11).position(|b| b == &blocks[12..=filter]);
    let mut second = blocks.clone();
    // The header of the second block says 4 GiB; that its sum is wrong comes later.
    second[size + at.unwrap() + filter - 12 + 2] = 40;
    let e = Watched::new(&second[..]).read_to_end(&mut all).unwrap_err().to_string();
    assert!(e.contains("4294967295 bytes of memory"), "{e}");

    // Two windows in one block, the first small and the second of 4 GiB: none, as to xz.
    let empty = through("xz", &["-c"], b"");
    let header = [0x02, 0x01, 0x21, 0x01, 0x00, 0x21, 0x01, 0x28];
    let mut crc = flate2::Crc::new();
    crc.update(&header);
    let two = [&empty[..12], &header, &crc.sum().to_le_bytes(), &[1; 100]].concat();
    let e = decompress(&two).unwrap_err().to_string();
    assert!(e.contains("filters are not understood"), "{e}");

    // An index of many more blocks than there are: behind the header of an empty stream.
    let index = [&empty[..12], &[0, 0xc1, 0xec, 0x97, 0xfc, 0xed, 0x20], &[0; 40]].concat();
    let e = decompress(&index).unwrap_err().to_string();
    assert!(e.contains("blocks, of at most 4194304"), "{e}");

    // The first frame, and another one: the library bounds them differently.
    let wide = through("zstd", &["-c", "--long=28"], &content);
    let small = through("zstd", &["-c"], &content);
    for stream in [wide.clone(), [small, wide].concat()] {
        let e = decompress(&stream).unwrap_err().to_string();
        assert!(e.contains("268435456 bytes of memory"), "{e}");
    }
}

/// What fills a medium's last block, for each format, of any length.
#[test]
fn zeros_behind_are_nothing_and_other_bytes_are_an_error() {
    let content = text(5000);
    for (program, args, format) in PROGRAMS {
        let one = through(program, args, &content);
        for zeros in [1, 2, 3, 4, 5, 511, 70_000] {
            let filled = [&one[..], &vec![0; zeros]].concat();
            assert!(decompress(&filled).unwrap() == (format, content.clone()), "{program} {zeros}");
            assert!(decompress(&[&filled[..], b"x"].concat()).is_err(), "{program} {zeros}");
        }
        // Its next part behind them.
        let twice = [&one[..], &[0; 8], &one].concat();
        assert!(decompress(&twice).unwrap().1.len() == 10_000, "{program}");
    }
}

/// A tar whose first name begins as another format does.
#[test]
fn a_tar_is_one_whatever_its_first_name() {
    for name in ["]", "BZh9.txt", "LZIP", "PK\x03\x04", "QFI"] {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(0);
        tar.append_data(&mut header, name, io::empty()).unwrap();
        let bytes = tar.into_inner().unwrap();
        assert!(decompress(&bytes).unwrap() == (Format::Plain, bytes), "{name}");
    }
}

#[test]
fn what_is_not_read_is_named() {
    for (first, name) in [
        (&b"BZh91AY"[..], "bzip2"),
        (b"LZIP\x01", "lzip"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"\x5d\0\0\x80\0", "lzma"),
        (b"\x1f\x9d\x90", "compress"),
        (b"PK\x03\x04", "ZIP"),
        (b"QFI\xfb", "qcow2"),
    ] {
        let e = decompress(first).unwrap_err().to_string();
        assert!(e.contains(name), "{e}");
    }
}
