-- Last: applies the privilege decisions. An upgrade ends with the same call.

CREATE FUNCTION tollgate.settle_privileges() RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    statement text;
BEGIN
    -- Only the owner keeps anything that was not granted on purpose: PUBLIC gets only what is decided below, and other
    -- roles lose what default privileges gave them.
    FOR statement IN
        SELECT DISTINCT format('REVOKE ALL ON %s %s FROM %s CASCADE',
                   CASE p.object_type WHEN 'VIEW' THEN 'TABLE' ELSE p.object_type END, p.object,
                   CASE p.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(p.grantee)) END)
        FROM tollgate.object_privileges p
        WHERE p.grantee <> p.owner
          AND CASE WHEN p.grantee <> 0 THEN p.unasked
                   ELSE (p.object_type, p.privilege) <> ('SCHEMA', 'USAGE')
                        AND NOT EXISTS (SELECT FROM tollgate.privilege_decisions d
                                        WHERE d.given_to = 'public' AND p.object_type = 'FUNCTION' AND d.object::regprocedure = p.object_id)
              END
    LOOP
        EXECUTE statement;
    END LOOP;

    FOR statement IN
        SELECT format('GRANT EXECUTE ON FUNCTION %s TO PUBLIC', d.object) FROM tollgate.privilege_decisions d
            WHERE d.given_to = 'public'
              AND NOT EXISTS (SELECT FROM tollgate.object_privileges p WHERE p.object_id = d.object::regprocedure AND p.grantee = 0)
        UNION ALL
        SELECT 'GRANT USAGE ON SCHEMA tollgate TO PUBLIC'
            WHERE NOT EXISTS (SELECT FROM tollgate.object_privileges p WHERE p.object_type = 'SCHEMA' AND p.grantee = 0)
    LOOP
        EXECUTE statement;
    END LOOP;

    -- At the commit: see renew_capability().
    UPDATE tollgate.capabilities SET granted_at = granted_at;
END
$$;
COMMENT ON FUNCTION tollgate.settle_privileges() IS
    'Applies the privilege decisions to new objects of an installation or upgrade, and has recorded capabilities granted again. Internal.';

SELECT tollgate.settle_privileges();
