//! Tables and types that differ from what the library knows are refused by name, not misread.

#[pgrx::pg_schema]
mod tests {
    use pgrx::prelude::*;

    const VERIFY: &str = "select (tollgate.verify_api_token('tgt_' || repeat('0', 80) || '7ef74675')).code";

    fn verify() -> Option<String> {
        Spi::get_one(VERIFY).expect("a verification")
    }

    /// The error of a verification: SQLSTATE, message, detail.
    fn refusal() -> (String, String, String) {
        PgTryBuilder::new(|| {
            let code = verify();
            panic!("not refused: {code:?}")
        })
        .catch_others(|error| match error {
            pg_sys::panic::CaughtError::PostgresError(report)
            | pg_sys::panic::CaughtError::ErrorReport(report) => (
                format!("{:?}", report.sql_error_code()),
                report.message().to_owned(),
                report.detail().unwrap_or_default().to_owned(),
            ),
            pg_sys::panic::CaughtError::RustPanic { ereport, .. } => panic!("{}", ereport.message()),
        })
        .execute()
    }

    fn assert_refused(change: &str, names: &str) {
        assert_eq!(verify().as_deref(), Some("NOT_FOUND"), "before {change}");
        Spi::run(change).expect("a change");
        let (sqlstate, message, detail) = refusal();
        assert_eq!(sqlstate, "ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE", "{change}: {message}");
        assert!(message.contains("do not match the library"), "{change}: {message}");
        assert!(detail.contains(names), "{change}: {detail}");
    }

    #[pg_test]
    fn a_result_type_with_another_number_of_columns_is_refused() {
        assert_refused("alter type tollgate.verification add attribute more text", "tollgate.verification");
    }

    #[pg_test]
    fn a_renamed_column_is_refused() {
        assert_refused("alter table tollgate.api_tokens rename revoked_at to withdrawn_at", "revoked_at");
    }

    #[pg_test]
    fn a_column_of_another_type_is_refused() {
        assert_refused(
            // ALTER TABLE would fail, because functions depend on that column.
            "update pg_attribute set atttypid = 'bigint'::regtype
             where attrelid = 'tollgate.api_tokens'::regclass and attname = 'rate_limit'",
            "rate_limit",
        );
    }

    #[pg_test]
    fn a_missing_index_is_refused() {
        assert_refused(
            "alter index tollgate.api_tokens_token_hash rename to hidden",
            "api_tokens_token_hash",
        );
    }

    #[pg_test]
    fn appended_columns_are_no_reason_to_refuse() {
        for n in 0..60 {
            Spi::run(&format!("alter table tollgate.api_tokens add column added_{n} text default 'x'"))
                .expect("a column");
        }
        assert_eq!(verify().as_deref(), Some("NOT_FOUND"));
        let code: Option<String> = Spi::get_one(
            "select (tollgate.verify_api_token((tollgate.create_api_token('u', 'n')).token)).code",
        )
        .expect("a verification");
        assert_eq!(code.as_deref(), Some("VALID"));
    }
}
