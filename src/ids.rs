//! Numbers of users and groups, as `docker run -u` takes them: 0 to 2147483647.
//!
//! Invariant: a text that has the shape of a number is never taken for a name, so
//! that one out of range is refused and not looked up. In particular 4294967295 (−1)
//! never reaches a system call, for which it means "leave it as it is".

/// The largest number of a user or group that is accepted.
pub const MAX_ID: u32 = i32::MAX as u32;

/// A user or group as it was named.
#[derive(Debug, PartialEq, Eq)]
pub enum Named<'a> {
    /// By its number.
    Number(u32),
    /// By its name.
    Name(&'a str),
}

/// Tells a number from a name.
///
/// # Errors
/// A sentence, for a number out of range; `what` is "user" or "group".
pub fn named<'a>(what: &str, text: &'a str) -> Result<Named<'a>, String> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(Named::Name(text));
    }
    text.parse::<i64>()
        .ok()
        .and_then(|n| u32::try_from(n).ok())
        .filter(|n| *n <= MAX_ID)
        .map(Named::Number)
        .ok_or_else(|| format!("{what} {text}: a number of a {what} is 0 to {MAX_ID}"))
}

/// `[USER][:GROUP]` in its two halves; an empty one is not given.
pub fn halves(text: &str) -> (Option<&str>, Option<&str>) {
    let (user, group) = text.split_once(':').unwrap_or((text, ""));
    let given = |part| Some(part).filter(|p: &&str| !p.is_empty());
    (given(user), given(group))
}

/// Whether the numbers in `[USER][:GROUP]` are in range; names are the guest's to know.
///
/// # Errors
/// A sentence.
pub fn check(text: &str) -> Result<(), String> {
    let (user, group) = halves(text);
    user.map(|u| named("user", u)).transpose()?;
    group.map(|g| named("group", g)).transpose()?;
    if text.contains('\0') {
        return Err(format!("user {text:?}: contains a NUL"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_looks_like_a_number_is_one_or_is_refused() {
        assert_eq!(named("user", "0"), Ok(Named::Number(0)));
        assert_eq!(named("user", "007"), Ok(Named::Number(7)));
        assert_eq!(named("user", "2147483647"), Ok(Named::Number(MAX_ID)));
        assert_eq!(named("user", "ann"), Ok(Named::Name("ann")));
        assert_eq!(named("user", "-"), Ok(Named::Name("-")));
        assert_eq!(named("user", "1a"), Ok(Named::Name("1a")));
        for text in ["2147483648", "4294967295", "4294967296", "-1", "18446744073709551616"] {
            let refused = named("user", text).unwrap_err();
            assert!(refused.contains(text) && refused.contains("0 to 2147483647"), "{refused}");
            check(text).unwrap_err();
            check(&format!("0:{text}")).unwrap_err();
        }
        assert_eq!(halves("a:b"), (Some("a"), Some("b")));
        assert_eq!(halves(":b"), (None, Some("b")));
        assert_eq!(halves("a:"), (Some("a"), None));
        check("a\0b").unwrap_err();
    }
}
