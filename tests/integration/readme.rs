//! What the README says that the code can check.

#[test]
fn the_readme_has_the_table_of_options_that_the_code_has() {
    let readme = include_str!("../../README.md");
    let table = vmcache::config::markdown();
    for line in table.lines() {
        assert!(readme.contains(line), "not in the README: {line}");
    }
}

#[test]
fn the_readme_says_of_agents_what_they_can_do() {
    let readme = include_str!("../../README.md");
    for line in vmcache::agent::matrix::markdown().unwrap().lines() {
        assert!(readme.contains(line), "not in the README: {line}");
    }
}
